"""Run the functions of a compiled library: TVM's virtual machine, without TVM's compiler."""

import ctypes
import importlib
import importlib.util
import math
import mmap
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import ArtifactError, OsscompileError

CPU = 1  # DLPack's device type
FAST_CORES = 1  # TVM's thread pool: prefer the cores with the highest frequency
POOLED = 2  # the virtual machine's allocator that keeps what it freed
RUNTIME_FOLDER = Path(__file__).parent.parent  # where a bundle has it
RUNTIME_LIBRARY = {"Darwin": "libtvm_runtime.dylib"}.get(os.uname().sysname, "libtvm_runtime.so")


class Device:
    """A loaded library. Tensors in and out are numpy arrays that share memory with the device.

    `threads`: CPU threads of every function of the process, as the last device was made with.
    """

    def __init__(self, library: Path, threads: int) -> None:
        self._machine = load_function(library, "vm_load_executable", threads)()
        # one device and the host, which is the same here: (type, id, allocator) each
        self._machine["vm_initialization"](CPU, 0, POOLED, CPU, 0, POOLED)
        self._functions: dict[str, Any] = {}
        self._library = library

    def tensor(self, array: np.ndarray) -> Any:
        """A device tensor over the memory of a C-contiguous, 64-byte aligned array."""
        return tensor(array)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The operating system gives memory to the array when it is first written, so that a long
        context costs what is used of it."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(memory, dtype).reshape(shape)

    def copy(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def restore(self, array: np.ndarray, saved: np.ndarray) -> None:
        array[...] = saved

    def clear(self, array: np.ndarray, count: int) -> None:
        """Set the first `count` along axis 1 to zero, or all if there are fewer."""
        array[:, :count] = 0

    def write(self, array: np.ndarray, part: np.ndarray) -> None:
        """Set the first along axis 1 to those of `part`."""
        array[:, : part.shape[1]] = part

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> Any:
        """Call a function with small inputs, which are copied, and tensors bound before. Raises
        ArtifactError if the library has no such function, or one that takes others."""
        tensors = [tensor(aligned_copy(array)) for array in inputs]
        try:
            if function not in self._functions:
                self._functions[function] = self._machine[function]
            return self._functions[function](*tensors, *bound)
        except Exception as error:  # TVM raises several, of no type of its own
            raise ArtifactError(
                f"{self._library}: expected functions as in the manifest, found: {error}; "
                "copy the artifact again, or compile the model again"
            ) from error

    def numpy(self, result: Any) -> np.ndarray:
        """What a function returned, in the same memory."""
        array: np.ndarray = np.from_dlpack(result)
        return array


def load_function(library: Path, name: str, threads: int) -> Any:
    """A function of a compiled library; `threads`: CPU threads of every function of the process."""
    # TVM would take half of the cores it sees. It reads this once, when its threads start; later
    # calls choose among those.
    os.environ.setdefault("TVM_NUM_THREADS", str(max(threads, os.cpu_count() or 1)))
    ffi = load_runtime()
    ffi.get_global_func("runtime.config_threadpool")(FAST_CORES, threads)
    try:
        # a path without a folder would be searched for elsewhere
        return ffi.load_module(str(library.resolve())).get_function(name, query_imports=True)
    except Exception as error:  # the loader raises whatever the library makes it raise
        raise ArtifactError(
            f"{library}: expected a library that this machine can load, found: {error}; "
            "compile the model again for this machine"
        ) from error


def tensor(array: np.ndarray) -> Any:
    """A device tensor over the memory of a C-contiguous, 64-byte aligned array."""
    assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous
    return load_runtime().from_dlpack(array)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, in memory that begins at a multiple of 64 bytes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


@cache
def load_runtime() -> ModuleType:
    """Load tvm_ffi, then libtvm_runtime, whose symbols compiled libraries look for."""
    ffi = _import_ffi()
    library = find_runtime_library()
    if library is None:
        raise ArtifactError(
            f"expected {RUNTIME_LIBRARY} beside the runtime or in an installed apache-tvm, found "
            "neither; run `osscompile bundle`, or set OSSCOMPILE_TVM_RUNTIME to its path"
        )
    _load_globally(library)
    return ffi


@cache
def load_device_runtime(device: str) -> ModuleType:
    """Load what TVM's runtime has for a device (one of `manifest.DEVICES`), from beside it."""
    ffi = load_runtime()
    library = find_runtime_library(device)
    if library is None:
        raise OsscompileError(
            f"{device}: expected {device_library(Path(RUNTIME_LIBRARY), device)} beside "
            f"{RUNTIME_LIBRARY}, found none; install an apache-tvm that has it, or run `osscompile "
            "bundle` again where one is installed"
        )
    _load_globally(library)
    return ffi


def device_library(runtime: Path, device: str) -> Path:
    """Where a library of TVM's runtime has what belongs to a device."""
    return runtime.with_stem(f"{runtime.stem}_{device}")


def _load_globally(library: Path) -> None:
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(
            f"{library}: expected TVM's runtime for this machine, found: {error}; install the "
            "apache-tvm that the artifact was compiled with, or run `osscompile bundle` again"
        ) from error


def find_runtime_library(device: str | None = None) -> Path | None:
    """OSSCOMPILE_TVM_RUNTIME, or a copy beside the runtime, or the one of an installed apache-tvm;
    of a `device`, what lies beside that."""
    candidates = [RUNTIME_FOLDER / RUNTIME_LIBRARY]
    if named := os.environ.get("OSSCOMPILE_TVM_RUNTIME"):
        candidates.insert(0, Path(named))
    package = importlib.util.find_spec("tvm")  # finds it without importing it
    if package is not None and package.origin is not None:
        candidates.append(Path(package.origin).parent / "lib" / RUNTIME_LIBRARY)
    found = next((path for path in candidates if path.is_file()), None)
    if found is None or device is None:
        return found
    beside = device_library(found, device)
    return beside if beside.is_file() else None


def _import_ffi() -> ModuleType:
    """Import tvm_ffi, which would import torch first where torch is installed: seconds."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("tvm_ffi")
    finally:
        if hide:
            del sys.modules["torch"]
