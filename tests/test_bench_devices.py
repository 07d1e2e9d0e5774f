"""`osscompile bench` of artifacts whose kernels the runtime launches on a device."""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from artifacts import run_python
from opencl_device import needs_opencl
from test_cuda import driver as driver  # a fixture
from test_cuda import image as image
from test_cuda import needs_nvcc

from osscompile import cli
from osscompile.bench import plot
from osscompile.codegen.tools import find_nvcc
from osscompile.runtime import load
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.bench import bandwidth_device
from osscompile.runtime.bench.bandwidth_device import PIECE_BYTES, SOURCES, THREADS, DeviceReader
from osscompile.runtime.bench.models import _fill_cache
from osscompile.runtime.bench.report import read_reports
from osscompile.runtime.devices.cuda import CudaDevice
from osscompile.runtime.devices.opencl import OpenCLDevice
from osscompile.runtime.errors import OsscompileError
from osscompile.runtime.memory import memory_bytes

BENCH = """
import sys
sys.modules["tvm"] = sys.modules["tvm_ffi"] = None  # as where there is no compiler
from pathlib import Path
from osscompile.runtime.bench import bandwidth_device
from osscompile.runtime.bench.models import bench
from osscompile.runtime.bench.report import table, write_reports
bandwidth_device.READ_BYTES = 1 << 22
report = bench(sys.argv[1], (16, 2000), (0, 100, 2000))
write_reports(Path(sys.argv[2]), [report])
print(table(report))
"""


@needs_opencl
def test_without_the_compiler(nano_opencl: Path, tmp_path: Path) -> None:
    printed = run_python(BENCH, nano_opencl, tmp_path / "r.json", cwd=tmp_path).stdout
    assert "decode at 100" in printed and "of roofline" in printed
    assert "int8 arithmetic peak: not measured" in printed
    (report,) = read_reports(tmp_path / "r.json")
    assert list(report.prefill) == [16]
    assert list(report.decode) == list(report.bandwidth_at) == [0, 100]
    assert report.bandwidth >= max(report.bandwidth_at.values()) > 0
    assert report.load_seconds and report.first_token_seconds and report.resident_bytes
    assert report.outside_share is not None and 0 < report.outside_share < 1
    assert report.device and "driver" in report.device
    assert json.loads((tmp_path / "r.json").read_text())[0]["int8_peak"] is None
    parts = memory_bytes(read_manifest(nano_opencl), 1024)
    least = parts["weights"] + parts["KV cache"] + parts["workspace"]
    assert report.device_bytes and least <= report.device_bytes < 1.2 * least
    pytest.importorskip("matplotlib")
    plot.plot(tmp_path / "p.png", [report])
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_artifact_of_a_device_is_not_sent(
    nano_opencl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TVM's server could not launch the artifact's kernels."""
    assert cli.main(["bench", str(nano_opencl), "--rpc", "127.0.0.1:1", "--key", "far"]) == 1
    assert "found one for opencl" in capsys.readouterr().err


@needs_opencl
def test_cache_is_filled_up_to_the_depth(nano_opencl: Path) -> None:
    model = load(nano_opencl)
    _fill_cache(model, list(range(100)))
    assert model._sequence.length == 100
    used = -(-100 // model.manifest.page_tokens)
    for array, cache in zip(model._runner.cache.arrays, model.manifest.caches, strict=True):
        content = np.empty(array.shape, cache.dtype)
        model._runner.device.read(array.memory, content)  # type: ignore[union-attr]
        assert (content[:used] != 0).mean() > 0.99 and not content[used:].any()
        assert abs(content[:used].astype(np.float32).std() - 1) < 0.1
    assert np.isfinite(model.decode(1)).all()


# --- The reader of memory ---------------------------------------------------------------------


def check_reader(reader: DeviceReader) -> None:
    """Every thread's sum is that of its bytes, so that nothing is left out."""
    data = np.empty(reader.num_bytes // 4, np.uint32)
    sums = np.empty(data.size * 4 // PIECE_BYTES * THREADS, np.uint32)
    for array, memory in zip((data, sums), reader._bound, strict=True):
        reader._device.read(memory, array)
    of_threads = data.reshape(-1, PIECE_BYTES // THREADS // 16, THREADS, 4)
    expected = of_threads.sum(axis=(1, 3), dtype=np.uint32).reshape(-1)
    assert len(np.unique(data)) > 1000
    np.testing.assert_array_equal(sums, expected)
    assert 0 < reader.best_seconds < 60 and 0 < reader.seconds() < 60


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_device, "READ_BYTES", 3 << 20)


@needs_opencl
@pytest.mark.usefixtures("small")
def test_opencl_reads_everything() -> None:
    check_reader(DeviceReader("opencl", OpenCLDevice.open()))


@pytest.mark.usefixtures("small")
def test_cuda_reads_everything(driver: ctypes.CDLL) -> None:
    """This checks the stand-in's kernel; only a GPU can show that the PTX does the same."""
    ctypes.c_size_t.in_dll(driver, "fake_room").value = 8 << 20
    check_reader(DeviceReader("cuda", CudaDevice.open()))


def test_device_without_room_for_the_data(driver: ctypes.CDLL) -> None:
    with pytest.raises(OsscompileError, match=r"expected room for 1073.7 MB more"):
        DeviceReader("cuda", CudaDevice.open())


@needs_nvcc
def test_ptx_is_compiled_without_spills(tmp_path: Path) -> None:
    (tmp_path / "read.ptx").write_text(SOURCES["cuda"])
    command = [str(find_nvcc()), "-arch=sm_90a", "-cubin", "-Xptxas=-v", "read.ptx"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "0 bytes spill stores" in result.stderr, result.stderr
