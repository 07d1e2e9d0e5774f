"""`osscompile bench`: that its arithmetic is right and its figures are there; never how large."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tvm
from artifacts import copy_artifact, reseal

from osscompile import bench as bench_module
from osscompile import bench_bandwidth, bench_int8, bench_machine, bench_plot, cli
from osscompile.bench import bench
from osscompile.bench_artifact import kv_bytes, token_macs
from osscompile.bench_report import (
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
from osscompile.compiler import GATHERED, _decode_bytes
from osscompile.importer.graph import cache_parameters, weight_parameters
from osscompile.importer.synthetic import TINY, gpt_oss_config
from osscompile.runtime.artifact import Manifest, Tensor, read_manifest
from osscompile.runtime.engine import Model
from osscompile.targets import Target

# 100 GB/s, 1 TMAC/s; a step reads 2 GB of weights, and 1 MB a position in each kind of layer.
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


def test_kv_bytes_of_gpt_oss_20b(tiny_artifact: Path) -> None:
    """Keys and values of 8 heads x 64 float16 are 2 KiB; 12 layers are full, 12 slide."""
    assert kv_bytes(manifest_of_20b(tiny_artifact, "fast")) == (12 * 2048, 12 * 2048)


@pytest.mark.parametrize("profile", ["fast", "exact"])
def test_token_macs_of_gpt_oss_20b(tiny_artifact: Path, profile: str) -> None:
    """qkv 5120 x 2880, out 2880 x 4096, router 32 x 2880, 4 experts of 3 x 2880 x 2880."""
    layer = 5120 * 2880 + 2880 * 4096 + 32 * 2880 + 4 * 3 * 2880 * 2880
    assert token_macs(manifest_of_20b(tiny_artifact, profile)) == 24 * layer


def manifest_of_20b(other: Path, profile: str) -> Manifest:
    """What the compiler would write of its tensors; the rest is that of another artifact."""
    config = gpt_oss_config(num_layers=24, num_experts=32)
    tensors = weight_parameters(config, profile, 64), cache_parameters(config, profile, 64, 16)
    weights, caches = (tuple(Tensor(p.name, p.shape, p.dtype) for p in part) for part in tensors)
    return dataclasses.replace(
        read_manifest(other),
        sliding=config.sliding,
        caches=caches,
        weights=weights,
        gathered=tuple(w.name for w in weights if w.name.startswith(GATHERED)),
        decode_bytes=_decode_bytes(config, weights),
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (9.994, "9.99"), (12.34, "12.3"), (12345.6, "12,346")],
)
def test_number_has_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert number(value) == text


# Measuring


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of the machine that nobody looks at."""
    monkeypatch.setattr(bench_bandwidth, "READ_BYTES", 1 << 24)


@pytest.mark.usefixtures("quick")
def test_report_of_a_small_model(tiny_artifact: Path) -> None:
    stages: list[str] = []
    report = bench(tiny_artifact, (16, 10_000), (0, 32, 10_000), stages.append)
    assert list(report.prefill) == [16]
    assert list(report.decode) == list(report.bandwidth_at) == [0, 32]
    assert report.bandwidth >= max(report.bandwidth_at.values()) > 0
    for timing in (*report.prefill.values(), *report.decode.values()):
        assert 0 < timing.fastest <= timing.median <= timing.slowest
    assert "prefill 16" in stages and "decode at 32" in stages and "prefill 10000" not in stages
    assert 0 < report.load_seconds < report.first_token_seconds
    assert report.outside_share is not None and 0 < report.outside_share < 1
    manifest = read_manifest(tiny_artifact)
    assert report.weight_bytes == manifest.decode_bytes
    assert report.manifest_sha256 in (tiny_artifact / "manifest.json").read_text()
    # TINY: qkv 640 rows, out 512 inputs, 8 experts of which 4 are used; 2 x 2 heads of 32 float32
    layer = 640 * 64 + 64 * 512 + 8 * 64 + 4 * 3 * 64 * 96
    assert report.token_macs == TINY.num_layers * layer
    assert report.full_kv_bytes == report.sliding_kv_bytes == 2 * 2 * 2 * 32 * 4


@pytest.mark.usefixtures("quick")
def test_cache_of_each_depth_is_filled_once(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deepest first, for the memory and for the time; the report keeps the order asked for."""
    filled: list[int] = []
    fill = bench_module._fill_cache

    def counted(model: Model, ids: list[int]) -> None:
        filled.append(len(ids))
        fill(model, ids)

    monkeypatch.setattr(bench_module, "_fill_cache", counted)
    report = bench(tiny_artifact, (), (0, 64, 64, 32))
    assert filled == [64, 32, 0]
    assert list(report.decode) == list(report.bandwidth_at) == [0, 64, 32]


@pytest.mark.usefixtures("quick")
def test_context_too_short_to_measure_anything(tiny_artifact: Path, tmp_path: Path) -> None:
    short = copy_artifact(tiny_artifact, tmp_path)
    reseal(short, lambda manifest: manifest.update(context=1))
    report = bench(short)
    assert report.prefill == {} and report.decode == {} and report.outside_share is None
    assert "decode" not in table(report)


def test_int8_loop_does_the_products_that_are_counted(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of every chain adds, lane by lane, the products of 4 bytes of each vector."""
    if this_machine.int8_dot not in bench_int8.LOOPS:
        pytest.skip("no loop for this machine's int8 instruction")
    monkeypatch.setattr(bench_int8, "STEPS", 3)
    loop, lanes = bench_int8.LOOPS[this_machine.int8_dot], this_machine.register_bits // 32
    weights = np.random.default_rng(0).integers(0, 25, (loop.vectors, lanes * 4), dtype=np.uint8)
    expected = np.repeat(np.arange(loop.chains, dtype=np.int32), lanes)
    for _ in range(3):
        x = np.repeat(weights[None], loop.chains, axis=0)
        if this_machine.int8_dot == "maddubs":
            x = expected.view(np.int8).reshape(loop.chains, 1, lanes * 4)
        products = x.astype(np.int32) * weights
        expected = expected + products.sum(axis=1).reshape(-1, 4).sum(axis=1, dtype=np.int32)
    target = tvm.target.Target(this_machine.tvm)
    sums = tvm.runtime.tensor(np.zeros_like(expected))
    module = bench_int8._module(loop, lanes)
    tvm.compile(module, target=target)["main"](tvm.runtime.tensor(weights), sums)
    np.testing.assert_array_equal(sums.numpy(), expected)


def test_bandwidth_loop_reads_everything(this_machine: Target) -> None:
    shape = (3, 40, bench_bandwidth.LANES)  # small, so that it fetches beyond the end
    data = np.random.default_rng(0).integers(0, 1 << 32, shape, dtype=np.uint32)
    sums = tvm.runtime.tensor(np.zeros((3, bench_bandwidth.LANES), np.uint32))
    target = tvm.target.Target(this_machine.tvm)
    for distance in bench_bandwidth.PREFETCH_BYTES:
        module = bench_bandwidth.read_module(distance, *shape[:2])
        tvm.compile(module, target=target)["read"](tvm.runtime.tensor(data), sums)
        np.testing.assert_array_equal(sums.numpy(), data.sum(axis=1, dtype=np.uint32))


def test_other_processes_are_seen_and_our_own_are_not() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("the system does not tell")
    cores = os.cpu_count() or 1
    seconds = 1.1 * bench_machine.LEAST_CPU_SECONDS / cores
    own = bench_machine.OtherProcesses()
    spin(seconds)
    alone = own.share()
    code = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    others = bench_machine.OtherProcesses()
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(cores)]
    time.sleep(seconds)
    busy = others.share()
    for process in processes:
        process.kill()
        process.wait()
    assert alone is not None and busy is not None and busy > 0.3
    assert alone < busy  # others may run too


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert bench_machine.source_commit() is None


def test_commit_of_a_checkout_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(bench_machine, "__file__", str(tmp_path / "bench_machine.py"))
    assert bench_machine.source_commit() is None


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
    with pytest.raises(BenchError, match=r"expected reports of `osscompile bench --json`, found"):
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
        bench_plot.plot(file, reports)
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


# The command


def test_command_measures_two_and_compares_them(
    tiny_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, sizes = tmp_path / "figures.json", ["--prefill", "16", "--decode", "0"]
    assert cli.main(["bench", *[str(tiny_artifact)] * 2, *sizes, "--json", str(file)]) == 0
    printed = capfd.readouterr().out
    assert printed.count("read bandwidth") == 2 and "of roofline" in printed
    first, second = read_reports(file)
    # each in a process of its own: what the second took at most is not the sum of both
    assert first.peak_bytes and second.peak_bytes and second.peak_bytes < 1.5 * first.peak_bytes
    assert cli.main(["bench", "--compare", str(file), "--plot", str(tmp_path / "p.png")]) == 0
    assert "decode at 0, tok/s" in capfd.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected artifacts or --compare"),
        (["{artifact}", "--compare", "x.json"], "found both"),
        (["{artifact}", "{tmp}/none.osc"], "none.osc: expected an artifact"),
        (["{artifact}", "--json", "{tmp}/none/r.json"], "expected a file that can be written"),
        (["{artifact}", "--plot", "{tmp}"], "expected a file that can be written"),
        (["--compare", "{tmp}/none.json"], "none.json: expected reports"),
    ],
)
def test_mistakes_are_told_before_measuring(
    arguments: list[str],
    message: str,
    tiny_artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("osscompile.bench.ProcessPoolExecutor", None)  # nothing is measured
    filled = [part.format(artifact=tiny_artifact, tmp=tmp_path) for part in arguments]
    assert cli.main(["bench", *filled]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_plot_without_matplotlib(
    tiny_artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", str(tiny_artifact), "--plot", "never.png"]) == 1
    printed = capsys.readouterr()
    assert "pip install 'osscompile[plot]'" in printed.err and printed.out == ""


# tests/bench, which runs only when asked for


def test_kernel_benchmarks_run() -> None:
    """Some of them, once; their figures are nobody's concern here."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    ]
    some = "decode and (embed or attention_sliding or moe_down or sort_by_expert)"
    folder = Path(__file__).parent
    result = subprocess.run([*command, "-k", some], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 passed" in result.stdout
