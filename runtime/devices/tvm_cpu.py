"""Run the functions of a compiled library on the CPU: TVM's virtual machine."""

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from .tvm_runtime import load_function, load_runtime, use_threads

CPU = 1  # DLPack's device type
POOLED = 2  # the virtual machine's allocator that keeps what it freed


class Device:
    """A loaded library. Tensors in and out are numpy arrays that share memory with the device.

    `threads`: CPU threads of its functions; `sha256`: of the library.
    """

    array_limit = None

    def __init__(self, library: Path, threads: int, sha256: str | None = None) -> None:
        self._threads = threads
        self._machine = load_function(library, "vm_load_executable", threads, sha256)()
        # one device and the host, which is the same here: (type, id, allocator) each
        self._machine["vm_initialization"](CPU, 0, POOLED, CPU, 0, POOLED)
        self._functions: dict[str, Any] = {}
        self._library = library

    def tensor(self, array: np.ndarray) -> Any:
        """A device tensor over the memory of a C-contiguous, 64-byte aligned array."""
        return tensor(array)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The operating system gives memory to the array when it is first written, so that a long
        context costs what is used of it; in huge pages, where it can, which read faster."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype).reshape(shape)

    def write(self, array: np.ndarray, part: np.ndarray, start: int = 0) -> None:
        """Set elements along axis 0, from `start` on."""
        array[start : start + len(part)] = part

    def copy(self, array: np.ndarray, source: int, target: int) -> None:
        """Set one element along axis 0 to what another is."""
        array[target] = array[source]

    def clear(self, array: np.ndarray, count: int, start: int = 0) -> None:
        """Set `count` elements along axis 0 to zero, from `start` on."""
        array[start : start + count] = 0

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> Any:
        """Call a function with small inputs, which are copied, and tensors bound before. Raises
        ArtifactError if the library has no such function, or one that takes others."""
        use_threads(self._threads)
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
