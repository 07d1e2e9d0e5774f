"""Reports of `osscompile bench`: their arithmetic, tables, files and picture."""

import dataclasses
import json
from pathlib import Path

import pytest

from osscompile.bench import plot
from osscompile.runtime.bench.report import (
    BenchError,
    Report,
    Timing,
    check_writable,
    comparison,
    number,
    read_reports,
    rows,
    table,
    write_reports,
)

# 100 GB/s and 1 TMAC/s; a step reads 2 GB of weights, and 1 MB a position in each kind of layer.
REPORT = Report(
    model="made-up",
    profile="fast",
    target="here",
    variant="only",
    manifest_sha256="0123456789abcdef",
    cpu="Abacus",
    cores=2,
    memory_bytes=8_000_000_000,
    versions={"osscompile": "0.1.0"},
    commit=None,
    date="2026-11-24T00:00:00+00:00",
    other_processes=0.01,
    bandwidth=110e9,
    bandwidth_at={0: 100e9, 1899: 100e9},
    int8_peak=1e12,
    weight_bytes=2_000_000_000,
    token_macs=1_000_000_000,
    full_kv_bytes=1_000_000,
    sliding_kv_bytes=1_000_000,
    window=100,
    load_seconds=0.5,
    first_token_seconds=0.75,
    resident_bytes=3_000_000_000,
    peak_bytes=3_500_000_000,
    outside_share=0.02,
    prefill={64: Timing(0.5, 0.4, 0.6, 5, None)},
    decode={0: Timing(0.04, 0.03, 0.05, 32, 0.04), 1899: Timing(0.05, 0.04, 0.06, 32, None)},
)


# Arithmetic


def test_roofline_before_and_beyond_the_window() -> None:
    """Depth 0 reads its own position; at 1,899 full layers read 1,900, sliding ones 100."""
    assert REPORT.step_bytes(0) == 2_000_000_000 + 1_000_000 + 1_000_000
    assert REPORT.step_bytes(98) == 2_000_000_000 + 99_000_000 + 99_000_000
    assert REPORT.step_bytes(1899) == 2_000_000_000 + 1_900_000_000 + 100_000_000
    assert REPORT.roofline(1899) == 25.0


def test_shares_of_the_limits() -> None:
    """20 of 25 steps a second; 64 tokens of 1 GMAC in 0.5 s are 128 of 1,000 GMAC/s."""
    found = {row.name: row for row in rows(REPORT)}
    assert found["decode at 1899"].value == 20.0
    assert found["decode at 1899"].share == pytest.approx(0.8)
    assert found["prefill 64"].value == 128.0
    assert found["prefill 64"].share == pytest.approx(0.128)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (9.994, "9.99"), (12.34, "12.3"), (12345.6, "12,346")],
)
def test_number_has_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert number(value) == text


# Tables


def test_table_warns_of_other_processes() -> None:
    assert "warning" not in table(REPORT)
    busy = dataclasses.replace(REPORT, other_processes=0.31)
    assert "warning: other processes used 31 % of the CPU" in table(busy)
    busy = dataclasses.replace(REPORT, decode={0: Timing(0.04, 0.03, 0.05, 32, 0.31)})
    assert "30.0 to 50.0 ms in 32 runs; other processes used 31 %" in table(busy)


def test_comparison_of_two_reports() -> None:
    other = dataclasses.replace(
        REPORT,
        cpu="Slide rule",
        bandwidth=60e9,
        bandwidth_at={0: 50e9, 7: 50e9},
        int8_peak=None,
        decode={0: Timing(0.08, 0.08, 0.08, 32, None), 7: REPORT.decode[0]},
    )
    lines = {line.split("  ")[0]: line.split() for line in comparison([REPORT, other]).splitlines()}
    assert lines["CPU"][1:] == ["Abacus", "Slide", "rule"]
    # 25 of 49.95 and 12.5 of 24.98 steps a second
    assert lines["decode at 0, tok/s"][4:] == ["25.0", "50", "%", "12.5", "50", "%", "0.50x"]
    assert lines["decode at 7, tok/s"][4:6] == ["-", "25.0"]
    assert lines["decode at 1899, tok/s"][-1] == "-"
    assert lines["int8 arithmetic peak, GMAC/s"][-2:] == ["1,000", "-"]
    assert lines["prefill 64, tok/s"][3:] == ["128", "13", "%", "128", "1.00x"]


def test_report_of_a_device() -> None:
    report = dataclasses.replace(
        REPORT, device="Loom (driver 1)", device_bytes=2_500_000_000, int8_peak=None
    )
    printed = table(report)
    assert "Loom (driver 1), Abacus, 2 cores" in printed
    assert "of the device's memory, the best of this run" in printed
    assert "int8 arithmetic peak: not measured on this machine" in printed
    assert "int8" not in printed.replace("int8 arithmetic peak: not measured", "")
    assert "not measured" not in table(REPORT)
    found = {row.name: row for row in rows(report)}
    assert found["device memory"].value == 2.5 and found["prefill 64"].share is None
    lines = {n.split("  ")[0]: n.split() for n in comparison([REPORT, report]).splitlines()}
    assert lines["device"][1:] == ["-", "Loom", "(driver", "1)"]
    assert lines["device memory, GB"][-2:] == ["-", "2.50"]


# Files


def test_json_round_trip(tmp_path: Path) -> None:
    other = dataclasses.replace(REPORT, commit="0" * 40, int8_peak=None, prefill={}, device="Loom")
    write_reports(tmp_path / "r.json", [REPORT, other])
    assert read_reports(tmp_path / "r.json") == [REPORT, other]
    first, _ = json.loads((tmp_path / "r.json").read_text())
    assert first["figures"]["decode at 1899, tok/s"] == 20.0


def test_json_from_before_devices(tmp_path: Path) -> None:
    write_reports(tmp_path / "r.json", [REPORT])
    reports = json.loads((tmp_path / "r.json").read_text())
    del reports[0]["device"], reports[0]["device_bytes"]
    (tmp_path / "r.json").write_text(json.dumps(reports))
    assert read_reports(tmp_path / "r.json") == [REPORT]


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report.pop("bandwidth"),
        lambda report: report.update(more=1),
        lambda report: report.update(bandwidth="fast"),
        lambda report: report.update(device=7),
        lambda report: report.update(bandwidth=float("nan")),
        lambda report: report.update(cores=True),
        lambda report: report.update(decode=[1]),
        lambda report: report["decode"].update(deep=report["decode"]["0"]),
        lambda report: report["decode"]["0"].pop("median"),
        lambda report: report["decode"]["0"].update(median=0),
        lambda report: report["bandwidth_at"].pop("0"),
        lambda report: report.update(weight_bytes=0, full_kv_bytes=0, sliding_kv_bytes=0),
    ],
)
def test_json_with_other_contents(tmp_path: Path, damage: object) -> None:
    file = tmp_path / "r.json"
    write_reports(file, [REPORT])
    reports = json.loads(file.read_text())
    damage(reports[0])  # type: ignore[operator]
    file.write_text(json.dumps(reports))
    with pytest.raises(BenchError, match=r"r.json: expected reports .* found: .*; measure again"):
        read_reports(file)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"[1]", b"[{}]", b"\xff\xfe", b"7"])
def test_json_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(BenchError, match=r"expected reports of `bench --json`, found"):
        read_reports(tmp_path / "r.json")


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"No such file"):
        read_reports(tmp_path / "r.json")


def test_checking_a_file_leaves_it_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    check_writable(tmp_path / "old")
    check_writable(tmp_path / "new")
    assert (tmp_path / "old").read_text() == "kept" and not (tmp_path / "new").exists()


def test_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    empty = dataclasses.replace(REPORT, prefill={}, decode={})
    for i, reports in enumerate([[REPORT], [empty], [REPORT, empty] * 5]):
        file = tmp_path / f"{i}.png"
        plot.plot(file, reports)
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000
