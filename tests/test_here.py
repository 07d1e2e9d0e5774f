"""What a machine is compiled for: its GPU's driver is asked, and then its CPU."""

import platform
from pathlib import Path

import pytest
from cuda_device import H100

from osscompile import here, targets
from osscompile.here import target_here
from osscompile.runtime.devices import cuda_driver
from osscompile.runtime.errors import OsscompileError
from osscompile.runtime.machine import Machine
from osscompile.targets import Target, TargetError

METAL = next(
    t for name in targets.names() for t in targets.load_variants(name)[:1] if t.device == "metal"
)
NEVER_HERE = next(
    t
    for name in targets.names()
    for t in targets.load_variants(name)[:1]
    if t.architecture not in ("any", platform.machine())
)


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUDA's compiler, under CUDA_HOME."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return compiler


def test_a_machine_without_a_gpu(
    this_machine: Target, nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "DRIVER", "libcuda-none.so")
    assert target_here() == this_machine


def test_driver_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the functions, or one fails."""
    monkeypatch.setattr(cuda_driver, "DRIVER", None)  # names this process
    assert here._cuda_architecture() is None


@pytest.mark.parametrize("architecture", ["sm_89", "sm_100", None])
def test_a_gpu_of_another_capability(
    this_machine: Target, nvcc: Path, architecture: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "_cuda_architecture", lambda: architecture)
    assert target_here() == this_machine


def test_a_gpu_without_its_compiler(
    this_machine: Target, nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "_cuda_architecture", lambda: "sm_90")
    assert target_here() == H100
    nvcc.unlink()
    monkeypatch.setenv("PATH", str(nvcc.parent))
    with pytest.warns(UserWarning, match="found no nvcc .* the CPU is used; install"):
        assert target_here() == this_machine


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_gpu_through_tvms_runtime(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def memory(device: str) -> None:
        asked.append(device)
        if not has_gpu:
            raise OsscompileError("none")

    machine = Machine(METAL.system, METAL.architecture, ())
    monkeypatch.setattr(Machine, "here", lambda: machine)
    monkeypatch.setattr(here, "TensorMemory", memory)
    monkeypatch.setattr(cuda_driver, "DRIVER", "libcuda-none.so")
    found = target_here()
    assert (found == METAL) == has_gpu and found.system == METAL.system
    assert asked == ["metal"]


def test_a_target_by_name_in_its_best_variant(this_machine: Target) -> None:
    assert target_here(this_machine.name) == this_machine
    assert target_here(H100.name) == H100  # what compiles need not be what runs


def test_a_variant_that_this_cpu_lacks(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = targets.load_variants(this_machine.name)[-1]
    machine = Machine(least.system, least.architecture, least.cpu_features)
    monkeypatch.setattr(Machine, "here", lambda: machine)
    assert target_here(this_machine.name) == least


def test_a_target_that_cannot_run_here() -> None:
    with pytest.raises(TargetError, match=f"expected one that runs here.*{NEVER_HERE.name!r}"):
        target_here(NEVER_HERE.name)


def test_a_target_that_is_none() -> None:
    with pytest.raises(TargetError, match="expected one of"):
        target_here("../targets")
