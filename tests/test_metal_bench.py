"""`osscompile bench` of artifacts for Metal, on the stand-in for TVM's Metal runtime."""

from __future__ import annotations

import gc
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi
from artifacts import TINY_OPTIONS
from metal_device import METAL, load_stand_in, needs_gxx, stand_in
from test_metal import for_here as for_here  # a fixture

import osscompile
from osscompile import cli
from osscompile.bench import bandwidth_tensor
from osscompile.bench.bandwidth_tensor import GROUP_BYTES, THREADS, TensorReader
from osscompile.bench.limits import LIMITS
from osscompile.runtime import load
from osscompile.runtime.bench import machine
from osscompile.runtime.bench.models import _fill_cache, bench
from osscompile.runtime.bench.report import read_reports, table, write_reports
from osscompile.runtime.devices.tvm_device import TensorDevice
from osscompile.runtime.devices.tvm_memory import TensorMemory
from osscompile.runtime.errors import ArtifactError


@pytest.fixture(scope="module")
def tiny(for_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("metal") / "tiny.osc"
    with warnings.catch_warnings(action="ignore"):  # it has no tokenizer
        options = TINY_OPTIONS | {"variants": None, "profile": "fast"}
        return osscompile.compile("synthetic:tiny", METAL.name, output, **options)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_tensor, "READ_BYTES", 3 << 20)


def held_bytes() -> int:
    """Return the bytes held in the stand-in's memory."""
    return int(tvm_ffi.get_global_func("metal.held_bytes")())


@needs_gxx
@pytest.mark.usefixtures("small")
def test_report(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report tells the planned memory, which is what the device holds."""
    monkeypatch.setattr("osscompile.runtime.bench.models.DECODE_STEPS", 4)  # long on the stand-in
    monkeypatch.setattr("osscompile.runtime.bench.models.REPEATS", 2)
    load_stand_in()
    gc.collect()  # what earlier tests held would go meanwhile
    tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()  # keeps workspaces for the next
    before, held = held_bytes(), []

    def progress(stage: str) -> None:
        if stage == "read bandwidth":
            held.append(held_bytes() - before)

    report = bench(tiny, (16, 1000), (0, 100, 1000), progress, LIMITS)
    assert list(report.prefill) == [16]
    assert list(report.decode) == list(report.bandwidth_at) == [0, 100]
    assert report.bandwidth >= max(report.bandwidth_at.values()) > 0
    assert report.load_seconds and report.first_token_seconds
    assert report.outside_share is not None and 0 < report.outside_share < 1
    assert report.device and report.device.startswith(("GPU (metal, ", "Apple "))
    assert report.device_bytes and report.int8_peak is None
    assert 0.8 * held[0] < report.device_bytes < 1.2 * held[0]
    write_reports(tmp_path / "r.json", [report])
    assert read_reports(tmp_path / "r.json") == [report]
    printed = table(report)
    assert "decode at 100" in printed and "of roofline" in printed
    assert "GB/s" in printed and "of the device's memory, the best of this run" in printed
    assert "int8 arithmetic peak: not measured" in printed


@needs_gxx
@pytest.mark.usefixtures("small")
def test_reader_reads_everything(for_here: None) -> None:
    """Every thread's sum is that of its bytes, so that nothing is left out."""
    load_stand_in()
    memory = TensorMemory("metal")
    reader = TensorReader(memory, METAL.name, METAL.variant)
    data, sums = (memory.numpy(tensor) for tensor in reader._tensors)
    of_threads = data.reshape(-1, GROUP_BYTES // THREADS // 16, THREADS, 4)
    assert data.nbytes == reader.num_bytes == 3 << 20 and len(np.unique(data)) > 1000
    np.testing.assert_array_equal(sums, of_threads.sum(axis=(1, 3), dtype=np.uint32))
    assert 0 < reader.best_seconds < 60 and 0 < reader.seconds() < 60


@needs_gxx
@pytest.mark.usefixtures("small")
def test_reader_that_the_driver_does_not_take(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_stand_in()
    device = load(tiny)._runner.device
    monkeypatch.setenv("METAL_COMPILER", "false")
    monkeypatch.setattr(bandwidth_tensor, "TOGETHER", 2)  # a kernel that is not compiled yet
    assert isinstance(device, TensorDevice)
    with pytest.raises(ArtifactError, match=r"expected kernels that the metal device can run"):
        TensorReader(device, METAL.name, METAL.variant)


@needs_gxx
def test_cache_is_filled_up_to_the_depth(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is filled in pieces that divide no page."""
    monkeypatch.setattr("osscompile.runtime.devices.tvm_memory.PIECE_BYTES", 1000)
    load_stand_in()
    model = load(tiny)
    _fill_cache(model, list(range(100)))
    assert model._sequence.length == 100
    used = -(-100 // model.manifest.page_tokens)
    for array in model._runner.cache.arrays:
        content = model._runner.device.numpy(array)
        assert (content[:used] != 0).mean() > 0.99 and not content[used:].any()
        assert abs(content[:used].astype(np.float32).std() - 1) < 0.1
    assert np.isfinite(model.decode(1)).all()


# --- Machines where it cannot run -------------------------------------------------------------


def test_machine_without_the_metal_runtime(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(tiny)]) == 1
    assert "metal: expected libtvm_runtime_metal" in capsys.readouterr().err


@needs_gxx
def test_machine_without_the_device(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (stand_in() | {"METAL_NO_DEVICE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["bench", str(tiny)]) == 1
    assert "metal: expected a device, found none on this machine" in capsys.readouterr().err


def test_artifact_is_not_sent(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(tiny), "--rpc", "127.0.0.1:1", "--key", "far"]) == 1
    assert "expected an artifact for a CPU, found one for metal" in capsys.readouterr().err


# --- Facts of a machine from macOS ------------------------------------------------------------

DISPLAYS = {"_name": "x", "sppci_model": "Apple M1", "sppci_cores": "8", "sppci_bus": "y"}


def command(folder: Path, name: str, output: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{output}'\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("displays", "name"),
    [
        ([DISPLAYS], "Apple M1, 8 cores"),
        ([{"sppci_model": "Apple M1"}], "Apple M1"),
        ([], None),
        ("none", None),
    ],
)
def test_name_of_the_gpu(
    displays: object, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path, "system_profiler", json.dumps({"SPDisplaysDataType": displays}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.gpu_name() == name


def test_name_of_the_gpu_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.gpu_name() is None


def test_name_of_the_cpu_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path, "sysctl", "Apple M1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "none")
    assert machine.cpu_name() == "Apple M1"
