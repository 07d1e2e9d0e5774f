"""`osscompile bench`: that its figures are there and consistent; never how large they are."""

import json
from pathlib import Path

import pytest

from osscompile import cli
from osscompile.bench import bench, table


def test_report_of_a_small_model(tiny_artifact: Path) -> None:
    report = bench(tiny_artifact, prefill_lengths=(16, 10_000), decode_depths=(0, 32, 10_000))
    assert list(report.prefill) == [16] and list(report.decode) == [0, 32]
    for timing in (*report.prefill.values(), *report.decode.values()):
        assert 0 < timing.fastest <= timing.median <= timing.slowest
    assert 0 < report.bytes_per_token < (tiny_artifact / "weights.safetensors").stat().st_size
    assert report.roofline == report.bandwidth / report.bytes_per_token
    assert any("memory speed" in note for _, _, note in table(report))


def test_command_prints_a_table_and_writes_json(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert cli.main(["bench", str(tiny_artifact), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "read bandwidth" in printed and "decode at 0" in printed
    figures = json.loads(file.read_text())
    manifest = json.loads((tiny_artifact / "manifest.json").read_text())
    assert figures["manifest_sha256"] == manifest["manifest_sha256"]
