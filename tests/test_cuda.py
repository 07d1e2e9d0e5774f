"""CUDA: the code that is compiled, and the calls of the driver. No GPU is at hand where this runs:
a stand-in for the driver does what it is told (see `cuda_device.py`)."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import re
import subprocess
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cuda_device
import numpy as np
import pytest
from cuda_device import H100, compile_here
from device_models import OF_GPT_OSS
from metal_device import needs_gxx
from smallest_graph import imported
from tvm import ir, tirx

import osscompile
from osscompile.codegen.cuda import compile_cuda, cuda_source, nvcc_command
from osscompile.codegen.dependence import mark_dependent
from osscompile.codegen.programs import build_programs
from osscompile.codegen.tools import find_nvcc
from osscompile.errors import CompileError
from osscompile.importer.choice import with_choose
from osscompile.importer.graph import build_graph
from osscompile.importer.synthetic import gpt_oss_config
from osscompile.passes import LAUNCH_PASSES, SHARED_PASSES, run_passes
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.devices import cuda, cuda_driver, cuda_staging
from osscompile.runtime.devices.cuda import CudaDevice
from osscompile.runtime.devices.memory import DeviceArray
from osscompile.runtime.devices.program import Input, Launch, Launches, Program
from osscompile.runtime.errors import ArtifactError, OsscompileError

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs CUDA's compiler, nvcc")

# --- Compiling --------------------------------------------------------------------------------


@cache
def gpt_oss(num_experts: int, profile: str) -> tuple[ir.IRModule, str]:
    """Two layers contain every kernel: return them, and their source."""
    config = gpt_oss_config(num_layers=2, num_experts=num_experts)
    module = with_choose(build_graph(config, profile, 131072, 512).module, config.vocab_size, 64)
    module = run_passes(module, H100, SHARED_PASSES + LAUNCH_PASSES)
    return module, cuda_source(module, H100)


@OF_GPT_OSS
def test_source_of_gpt_oss(num_experts: int, profile: str) -> None:
    module, source = gpt_oss(num_experts, profile)
    for program in build_programs(module).values():
        for launch in program.launches:
            assert f" {launch.kernel}(" in source
            assert np.prod(launch.threads) <= H100.max_threads


def test_launches_begin_early_but_where_they_read_early_what_the_one_before_writes() -> None:
    """The down projection loads its experts' weights early, and so reads early which these are:
    the launch before must not be what writes the logits."""
    module = run_passes(imported("fast"), H100, SHARED_PASSES + LAUNCH_PASSES)
    programs = build_programs(module)
    for program in programs.values():
        dependent = [launch.dependent for launch in program.launches]
        assert dependent == [False] + [True] * (len(dependent) - 1)
    launches = programs["step_1"].launches
    route, down = (
        next(launch for launch in launches if launch.kernel.startswith(name))
        for name in ("route_step", "moe_mxfp4_sum_step")
    )
    assert not mark_dependent([route, down], module)[1].dependent
    assert mark_dependent([launches[1], down], module)[1].dependent


def test_copies_that_run_meanwhile_read_early() -> None:
    """A product that has its activations copied before it waits cannot begin before the norm ends;
    as it is, it waits first."""
    module = run_passes(imported("fast"), H100, SHARED_PASSES + LAUNCH_PASSES)
    step = build_programs(module)["step"]
    launches, most = step.launches, step.symbols
    norm, product = (
        next(launch for launch in launches if launch.kernel.startswith(f"{name}_bf16"))
        for name in ("rms_norm", "dense_int8")
    )
    assert mark_dependent([norm, product], module, most)[1].dependent
    kernel = module[product.kernel]
    wait, *rest = kernel.body.seq
    module[product.kernel] = kernel.with_body(tirx.SeqStmt([*rest, wait]))
    assert not mark_dependent([norm, product], module, most)[1].dependent


@needs_nvcc
def test_compile_20b_for_sm_90a(tmp_path: Path) -> None:
    """Every kernel of the profile fast compiles, none spills registers, and none waits for each
    product of the matrix units before the next."""
    _, source = gpt_oss(32, "fast")
    (tmp_path / "kernels.cu").write_text(source)
    command = [*nvcc_command(str(find_nvcc()), H100), "-Xptxas=-v", "kernels.cu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert result.returncode == 0 and len(spills) > 30, result.stderr
    assert set(spills) == {("0", "0")}
    assert "serialized" not in result.stderr


@needs_nvcc
def test_nano_artifact(tmp_path: Path) -> None:
    artifact = osscompile.compile("nano", "h100", tmp_path / "nano.osc", context=1024)
    manifest = read_manifest(artifact)
    assert manifest.runtime == "cuda" and {"lib.fatbin", "lib.launches"} <= set(manifest.files)
    assert manifest.chunk == H100.prefill_chunk == 2048


def test_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(CompileError, match=r"expected CUDA's compiler, found no nvcc"):
        osscompile.compile("nano", "h100", tmp_path / "nano.osc")
    assert list(tmp_path.iterdir()) == []


@needs_nvcc
def test_output_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compile_cuda('extern "C" __global__ void f() {}', H100, Path("lib.fatbin"))
    assert [file.name for file in tmp_path.iterdir()] == ["lib.fatbin"]


def test_code_is_for_one_architecture() -> None:
    """nvcc would also compile for an older one, which lacks instructions."""
    command = nvcc_command("nvcc", H100)
    assert "arch=compute_90a,code=sm_90a" in command
    assert not any(word.startswith("-arch") for word in command)


@needs_nvcc
def test_source_that_nvcc_refuses(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"expected nvcc to succeed, .*error"):
        compile_cuda("int main( {", H100, tmp_path / "lib.fatbin")


# --- Launching --------------------------------------------------------------------------------

VOCAB = 4
OUT, IDS, POSITION, CACHE = ("storage", 0), ("input", 0), ("input", 1), ("bound", 0)
ONE, TOKENS = ("int64", 1), ("int64", "tokens")


def program(max_tokens: int, *, add: tuple[Any, ...] | None = None) -> Program:
    """Return a program for 2 x ids + position + the number of calls before + 7."""
    count, symbols = (TOKENS, {"tokens": max_tokens}) if max_tokens > 1 else (ONE, {})
    groups = "//", ("+", count[1], 1), 2
    launches = (
        Launch("twice", (OUT, IDS, count), (groups,), (2,)),
        Launch("add", (*(add or (OUT, POSITION, CACHE, count)), ("int32", 7)), (1, 1), (1, 1)),
    )
    inputs = (Input("ids", (count[1],)), Input("position", (1,)))
    return Program((max_tokens * 4,), launches, symbols, inputs, 0, (count[1],))


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module of the kernels in `cuda/kernels.cu`."""
    if needs_gxx.args[0]:
        pytest.skip(str(needs_gxx.kwargs["reason"]))
    output = tmp_path_factory.mktemp("cuda") / "lib.fatbin"
    compile_here((cuda_device.SHIM / "kernels.cu").read_text(), H100, output)
    return output


HELD = ("graphs", "events", "modules", "streams", "contexts")
COUNTS = ("launches", "graph_launches", "freed", *HELD)


@pytest.fixture
def driver(image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The stand-in for a GPU with little memory; its counters are zero."""
    library = str(cuda_device.driver())
    monkeypatch.setattr(cuda_driver, "DRIVER", library)
    loaded = ctypes.CDLL(library)
    for name in COUNTS:
        ctypes.c_int.in_dll(loaded, f"fake_{name}").value = 0
    room = ctypes.c_size_t.in_dll(loaded, "fake_room")
    before, room.value = room.value, 1 << 20
    yield loaded
    room.value = before
    ctypes.c_int.in_dll(loaded, "fake_devices").value = 1


def count(driver: ctypes.CDLL, name: str) -> int:
    return ctypes.c_int.in_dll(driver, name).value


def call(device: CudaDevice, function: str, bound: list[Any], *ids: int) -> list[float]:
    inputs = [np.array(ids, np.int32), np.array([100], np.int32)]
    result: list[float] = device.numpy(device.run(function, inputs, bound)).tolist()
    return result


def test_one_token_is_a_graph(driver: ctypes.CDLL, image: Path) -> None:
    device = CudaDevice(image, {"decode": program(1)})
    bound = [device.tensor(device.zeros((1, 4), "float32"))]
    assert [call(device, "decode", bound, n) for n in (1, 2, 30)] == [[109], [112], [169]]
    assert count(driver, "fake_graph_launches") == 3 and count(driver, "fake_launches") == 0


def test_a_device_that_is_dropped_leaves_nothing(driver: ctypes.CDLL, image: Path) -> None:
    """Whichever thread drops it: a context is current to the one that opened it only."""
    device = CudaDevice(image, {"decode": program(1)})
    bound = [device.tensor(device.zeros((1, 4), "float32"))]
    assert call(device, "decode", bound, 1) == [109]
    assert all(count(driver, f"fake_{name}") == 1 for name in HELD if name != "events")
    usage, held = device.usage, [device, bound]
    del device, bound
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert not any(count(driver, f"fake_{name}") for name in HELD)
    assert usage.num_bytes == 0 and count(driver, "fake_freed") == 4


def test_many_tokens_are_launched_and_as_many_again_are_a_graph(
    driver: ctypes.CDLL, image: Path
) -> None:
    device = CudaDevice(image, {"prefill": program(5)})
    bound = [device.tensor(device.zeros((1, 4), "float32"))]
    assert call(device, "prefill", bound, 1, 2, 3, 4, 5) == [109, 111, 113, 115, 117]
    assert call(device, "prefill", bound, 1, 2) == [110, 112]
    assert count(driver, "fake_graph_launches") == 0 and count(driver, "fake_launches") == 4
    assert call(device, "prefill", bound, 5, 6) == [119, 121]
    assert call(device, "prefill", bound, 7, 8) == [124, 126]
    assert count(driver, "fake_graph_launches") == 2 and count(driver, "fake_launches") == 4
    other = [device.tensor(np.float32([10, 0, 0, 0]))]
    assert call(device, "prefill", other, 1, 2) == [119, 121]


def test_graphs_that_were_not_used_for_long_go(
    driver: ctypes.CDLL, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "MOST_GRAPHS", 2)
    device = CudaDevice(image, {"prefill": program(5)})
    bound = [device.tensor(device.zeros((1, 4), "float32"))]
    for length in (1, 2, 1, 2, 1, 3, 3):  # two of 1, one of 2 and one of 3 are graphs
        call(device, "prefill", bound, *range(length))
    assert count(driver, "fake_graph_launches") == 4 and count(driver, "fake_graphs") == 2
    call(device, "prefill", bound, 0)
    assert count(driver, "fake_graph_launches") == 5 and count(driver, "fake_graphs") == 2
    call(device, "prefill", bound, 0, 1)  # is recorded again
    assert count(driver, "fake_graph_launches") == 6 and count(driver, "fake_graphs") == 2


def test_a_launch_without_groups_is_none(driver: ctypes.CDLL, image: Path) -> None:
    two = program(5)
    twice, add = two.launches
    some = dataclasses.replace(twice, groups=(("*", twice.groups[0], ("-", "tokens", 1)),))
    device = CudaDevice(image, {"prefill": dataclasses.replace(two, launches=(some, add))})
    bound = [device.tensor(device.zeros((1, 4), "float32"))]
    call(device, "prefill", bound, 1)
    assert count(driver, "fake_launches") == 1
    call(device, "prefill", bound, 1, 2)
    assert count(driver, "fake_launches") == 3


def test_memory_bound_anew_is_used(driver: ctypes.CDLL, image: Path) -> None:
    device = CudaDevice(image, {"decode": program(1)})
    first = [device.tensor(np.float32([10, 0, 0, 0]))]
    other = [device.tensor(np.float32([20, 0, 0, 0]))]
    assert [call(device, "decode", b, 1) for b in (first, other, first)] == [[119], [129], [120]]


def test_arrays_of_the_cache(driver: ctypes.CDLL, image: Path) -> None:
    device = CudaDevice(image, {"decode": program(1)})
    array = device.zeros((2, 3), "float32")
    bound = [device.tensor(array)]
    assert [call(device, "decode", bound, 1) for _ in range(2)] == [[109], [110]]
    device.copy(array, 1, 0)  # which is zero still
    assert call(device, "decode", bound, 1) == [109]
    device.copy(array, 0, 1)
    device.clear(array, 0)
    assert call(device, "decode", bound, 1) == [110]
    device.clear(array, 1)
    assert call(device, "decode", bound, 1) == [109]
    device.copy(array, 1, 0)
    assert call(device, "decode", bound, 1) == [110]


def test_memory_that_nobody_holds_is_freed(driver: ctypes.CDLL, image: Path) -> None:
    device = CudaDevice(image, {})
    array = device.zeros((2, 3), "float32")
    for _ in range(3):
        device.zeros((2, 3), "float32")
    assert count(driver, "fake_freed") == 3
    del array
    assert count(driver, "fake_freed") == 4


def test_memory_that_is_held_is_counted(driver: ctypes.CDLL, image: Path) -> None:
    device = CudaDevice(image, {"decode": program(1)})
    array = device.zeros((2, 3), "float32")
    call(device, "decode", [device.tensor(array)], 1)
    assert device.usage.num_bytes == 24 + 4 + 4 + 4  # the inputs, and the storage
    beside = CudaDevice(image, {}, device.opened)
    more = beside.zeros((2, 3), "float32")
    assert beside.usage.num_bytes == device.usage.num_bytes == 60
    del more
    assert device.usage.num_bytes == 36


def test_part_of_an_array_is_written(driver: ctypes.CDLL, image: Path) -> None:
    device = CudaDevice(image, {})
    array, found = device.zeros((2, 3, 2), "float32"), np.empty((2, 3, 2), np.float32)
    part = np.float32([[[1, 2], [3, 4], [5, 6]]])
    device.write(array, part, 1)
    device.read(array.memory, found)
    assert found.tolist() == [[[0, 0]] * 3, *part.tolist()]
    device.write(array, np.broadcast_to(part, array.shape))
    device.read(array.memory, found)
    assert found.tolist() == [*part.tolist(), *part.tolist()]


TWICE = Launches((), (Launch("quick", (("bound", 0), ("bound", 1), ("int64", 3)), (1,), (10,)),))


def test_calls_are_timed_as_one_graph(driver: ctypes.CDLL, image: Path) -> None:
    """Each call has its own memory, and nothing of the graph is left."""
    device = CudaDevice(image, {"twice": TWICE})
    calls = [
        [device.tensor(np.zeros(3, np.float32)), device.tensor(np.float32([n, 2, 3]))]
        for n in range(5)
    ]
    assert 0 < device.seconds("twice", calls) < 1
    assert count(driver, "fake_graph_launches") == 1 and count(driver, "fake_launches") == 0
    found = np.empty(3, np.float32)
    for n, (out, _) in enumerate(calls):
        device.read(out, found)
        assert found.tolist() == [2 * n, 4, 6]
    gc.collect()
    assert count(driver, "fake_graphs") == count(driver, "fake_events") == 0


def test_graph_that_cannot_be_recorded_leaves_the_stream_as_it_was(
    driver: ctypes.CDLL, image: Path
) -> None:
    (launch,) = TWICE.launches
    too_many = dataclasses.replace(launch, threads=(2048,))
    device = CudaDevice(image, {"twice": TWICE, "large": Launches((), (too_many,))})
    bound = [device.tensor(np.zeros(3, np.float32)) for _ in range(2)]
    with pytest.raises(ArtifactError, match=r"can run, found: .*too many resources"):
        device.seconds("large", [bound])
    device.call("twice", bound)
    assert count(driver, "fake_launches") == 1 and device.is_alive()


def test_memory_that_a_launch_adds_is_asked_for(driver: ctypes.CDLL, image: Path) -> None:
    """The driver gives a block more than 48 KB only then, and never more than it has."""
    (launch,) = TWICE.launches
    for added, fits in (
        (64 << 10, True),
        (H100.shared_bytes, True),
        (H100.shared_bytes + 1, False),
    ):
        device = CudaDevice(
            image, {"twice": Launches((), (dataclasses.replace(launch, shared_bytes=added),))}
        )
        bound = [device.tensor(np.zeros(3, np.float32)) for _ in range(2)]
        if fits:
            device.call("twice", bound)
            continue
        with pytest.raises(ArtifactError, match=r"quick: .*invalid value"):
            device.call("twice", bound)


def test_kernel_that_takes_other_parameters(driver: ctypes.CDLL, image: Path) -> None:
    for add in ((OUT, POSITION, CACHE), (OUT, POSITION, CACHE, ONE, ONE), (OUT,) * 3):
        device = CudaDevice(image, {"decode": program(1, add=add)})
        with pytest.raises(ArtifactError, match=r"add takes parameters of .* the program gives"):
            call(device, "decode", [device.tensor(np.zeros(1, np.float32))], 1)


def test_kernel_that_is_not_there(driver: ctypes.CDLL, image: Path) -> None:
    launch = Launch("subtract", (), (1,), (1,))
    device = CudaDevice(image, {"decode": Program((4,), (launch,), {}, (), 0, (1,))})
    with pytest.raises(ArtifactError, match=r"subtract: .*not found.*compile them again"):
        device.run("decode", [], [])


def test_image_that_is_none(driver: ctypes.CDLL, tmp_path: Path) -> None:
    (tmp_path / "lib.fatbin").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"lib.fatbin: expected kernels that this GPU can run"):
        CudaDevice(tmp_path / "lib.fatbin", {})


def test_too_little_room(driver: ctypes.CDLL, image: Path) -> None:
    device = CudaDevice(image, {})
    with pytest.raises(OsscompileError, match=r"expected room for 4.2 MB more, .*out of memory"):
        device.zeros((1024, 1024), "float32")


def test_large_arrays_are_copied_in_pieces_by_several_threads(
    driver: ctypes.CDLL, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "STAGED_BYTES", 1000)
    monkeypatch.setattr(cuda_staging, "PIECE_BYTES", 96)
    device, rng = CudaDevice(image, {}), np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(np.float32) for size in (249, 250, 7200, 7201)]
    for array in arrays:
        memory = device.tensor(array)
        np.testing.assert_array_equal(device.numpy(DeviceArray(memory, array.shape)), array)
    part = arrays[3][:2000]
    device.write(DeviceArray(memory, arrays[3].shape), part, 5000)
    found = device.numpy(DeviceArray(memory, arrays[3].shape))
    np.testing.assert_array_equal(found, np.concatenate([arrays[3][:5000], part, arrays[3][7000:]]))
    assert count(driver, "fake_pinned") > 0
    del device, memory
    gc.collect()
    assert count(driver, "fake_pinned") == 0


def test_no_gpu(driver: ctypes.CDLL, image: Path) -> None:
    ctypes.c_int.in_dll(driver, "fake_devices").value = 0
    with pytest.raises(OsscompileError, match=r"expected a GPU, found: .*no device"):
        CudaDevice(image, {})


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_driver, "DRIVER", str(tmp_path / "libcuda.so.1"))
    with pytest.raises(OsscompileError, match=r"expected the driver's .*install NVIDIA's driver"):
        CudaDevice(tmp_path, {})
