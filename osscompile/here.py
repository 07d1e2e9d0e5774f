"""Choose what to compile for, to run it on this machine."""

import ctypes
import warnings

from . import targets
from .codegen.tools import find_nvcc
from .runtime.devices import cuda_driver
from .runtime.devices.tvm_memory import TensorMemory
from .runtime.errors import OsscompileError
from .runtime.machine import Machine
from .runtime.manifest import ANY
from .targets import Target, TargetError

CAPABILITY_ATTRIBUTES = 75, 76  # of a device of CUDA: major and minor


def target_here(name: str | None = None) -> Target:
    """The target of that name, in its best variant that fits this machine; without a name the
    target of its GPU, or else of its CPU.

    A GPU counts if this machine has all that compiles for it, and its driver says that it fits.
    OpenCL's devices are taken by name only, since a CPU may be one. Raises TargetError if the named
    target, or none, fits.
    """
    if name is not None:
        fitting = [target for target in targets.load_variants(name) if _fits(target)]
        if not fitting:
            raise TargetError(
                f"target: expected one that runs here, on {Machine.here().system} and "
                f"{Machine.here().architecture}, found {name!r}; `osscompile compile` makes "
                "artifacts for other machines"
            )
        return fitting[0]
    variants = (target for name in targets.names() for target in targets.load_variants(name))
    gpus = (target for target in variants if target.family == "gpu" and _fits(target))
    return next(filter(_has_gpu, gpus), None) or targets.of_this_machine()


def _fits(target: Target) -> bool:
    """Whether it is of this system and CPU."""
    here = Machine.here()
    return (
        target.system in (ANY, here.system)
        and target.architecture in (ANY, here.architecture)
        and set(target.cpu_features) <= set(here.cpu_features)
    )


def _has_gpu(target: Target) -> bool:
    if target.runtime == "tvm":
        try:
            TensorMemory(target.device)
        except OsscompileError:
            return False
        return True
    if target.runtime != "cuda" or target.tvm["arch"].rstrip("a") != _cuda_architecture():
        return False
    if find_nvcc() is None:
        warnings.warn(
            f"{target.description}: expected CUDA's compiler beside this GPU, found no nvcc on the "
            "path or under CUDA_HOME: the CPU is used; install the CUDA toolkit, 12.4 or later",
            stacklevel=2,
        )
        return False
    return True


def _cuda_architecture() -> str | None:
    """What CUDA calls the first GPU's instructions, such as sm_90; None without a GPU."""
    numbers = []
    try:
        driver = ctypes.CDLL(cuda_driver.DRIVER)
        device, number = ctypes.c_int(), ctypes.c_int()
        first = ctypes.byref(device), cuda_driver.FIRST_DEVICE
        statuses = [driver.cuInit(0), driver.cuDeviceGet(*first)]
        for attribute in CAPABILITY_ATTRIBUTES:
            address = ctypes.byref(number)
            statuses.append(driver.cuDeviceGetAttribute(address, attribute, device))
            numbers.append(number.value)
    except (OSError, AttributeError):
        return None
    return None if any(statuses) else f"sm_{numbers[0]}{numbers[1]}"
