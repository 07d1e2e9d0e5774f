"""Run the functions of a compiled library on a device that has memory of its own: TVM's virtual
machine, and TVM's runtime for that device.

Weights, caches and activations are tensors in that memory; what is copied are token ids, and what
the host asks for of a result.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .device import CPU, POOLED, aligned_copy, load_device_runtime, load_function, tensor
from .errors import ArtifactError, OsscompileError

EXISTS, TOTAL_MEMORY = 0, 14  # attributes of a device; the second in bytes that it may use
# TVM's runtime copies through a buffer as large as the largest piece, and keeps the buffer.
PIECE_BYTES = 64 << 20
MOST_INPUTS = 4  # of calls that nobody waited for: of a prefill, and of the choice of a token


class TensorDevice:
    """A loaded library on the first device of a kind, one of `artifact.DEVICES`.

    `threads`: CPU threads of what the host computes; `needed_bytes`: of the device's memory.
    Raises OsscompileError without TVM's runtime for that device, without the device or without room
    on it, ArtifactError for kernels that it cannot compile or run.
    """

    def __init__(self, library: Path, device: str, threads: int, needed_bytes: int) -> None:
        self._library, self._name = library, device
        ffi = load_device_runtime(device)
        self._device = ffi.device(device, 0)
        kind = self._device.dlpack_device_type()
        attribute = ffi.get_global_func("runtime.GetDeviceAttr")
        if not attribute(kind, 0, EXISTS):
            raise OsscompileError(
                f"{device}: expected a device, found none on this machine; compile the model for "
                "its CPU (`osscompile targets`)"
            )
        room = attribute(kind, 0, TOTAL_MEMORY)
        if needed_bytes > room:
            raise OsscompileError(
                f"{device}: expected {needed_bytes / 1e9:.2f} GB that the device may use, found "
                f"{room / 1e9:.2f}; compile the model with a smaller --context"
            )
        self._shape = ffi.Shape
        self._allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._view = ffi.get_global_func("runtime.TVMTensorCreateView")
        self._copy = ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._write = ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._read = ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        self._machine = load_function(library, "vm_load_executable", threads)()
        # the device and the host, where shapes are computed: (type, id, allocator) each
        self._machine["vm_initialization"](kind, 0, POOLED, CPU, 0, POOLED)
        self._functions: dict[str, Any] = {}
        self._inputs: list[Any] = []  # of the last calls

    def tensor(self, array: Any) -> Any:
        """A tensor of the device: a copy of a numpy array, or one that it is already."""
        if not isinstance(array, np.ndarray):
            return array
        held = self._empty(array.shape, str(array.dtype))
        flat = array.reshape(-1).view(np.uint8)
        for begin, size in _pieces(0, flat.nbytes):
            piece = flat[begin : begin + size]
            self._write(self._bytes(held, begin, size), _address(piece), size)
        return held

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        array = self._empty(shape, dtype)
        self.clear(array, shape[1])
        return array

    def copy(self, array: Any) -> Any:
        saved = self._empty(tuple(array.shape), str(array.dtype))
        self.restore(saved, array)
        return saved

    def restore(self, array: Any, saved: Any) -> None:
        self._copy(saved, array)

    def clear(self, array: Any, count: int) -> None:
        """Set the first `count` along axis 1 to zero, or all if there are fewer."""
        rows, columns, *rest = (int(extent) for extent in array.shape)
        column_bytes = int(np.prod(rest)) * np.dtype(str(array.dtype)).itemsize
        num_bytes = min(count, columns) * column_bytes
        zeros = np.zeros(min(num_bytes, PIECE_BYTES), np.uint8)
        for row in range(rows):
            for begin, size in _pieces(row * columns * column_bytes, num_bytes):
                self._write(self._bytes(array, begin, size), _address(zeros), size)

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> Any:
        """Call a function with small inputs, which are copied, and tensors bound before -> what it
        returns, a tensor of the device."""
        if len(self._inputs) + len(inputs) > MOST_INPUTS:
            self._inputs.clear()  # first: to free memory waits for all that the device was told
        with self._report():
            if function not in self._functions:
                self._functions[function] = self._machine[function]
            tensors = [self._input(array) for array in inputs]
            self._inputs += tensors
            return self._functions[function](*tensors, *bound)

    def numpy(self, result: Any) -> np.ndarray:
        """A copy of what a function returned; it waits for the device."""
        array = np.empty(tuple(result.shape), str(result.dtype))
        with self._report():
            self._read(result, _address(array), array.nbytes)
        self._inputs.clear()  # which need not be waited for now
        return array

    @contextlib.contextmanager
    def _report(self) -> Iterator[None]:
        """Make an error of ours of what TVM raises, which is what the device's driver says."""
        try:
            yield
        except OsscompileError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{self._library}: expected kernels that the {self._name} device can run, found: "
                f"{error}; compile the model again, or update the system"
            ) from error

    def _input(self, array: np.ndarray) -> Any:
        """Like `tensor`, but without waiting until the device has it: what the device is told next
        comes after, and a copy to Metal reads the host's memory at once."""
        held = self._empty(array.shape, str(array.dtype))
        self._copy(tensor(aligned_copy(array)), held)
        return held

    def _empty(self, shape: Sequence[int], dtype: str) -> Any:
        try:
            return self._allocate(self._shape(shape), dtype, self._device, None)
        except Exception as error:
            num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            raise OsscompileError(
                f"{self._name}: expected room for {num_bytes / 1e6:.1f} MB more, found: {error}; "
                "compile the model with a smaller --context"
            ) from error

    def _bytes(self, array: Any, begin: int, size: int) -> Any:
        """A part of a tensor's memory, as a tensor of bytes."""
        return self._view(array, self._shape([size]), "uint8", begin)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def _pieces(begin: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """(begin, size) of parts that are small enough to be copied."""
    for offset in range(0, num_bytes, PIECE_BYTES):
        yield begin + offset, min(PIECE_BYTES, num_bytes - offset)
