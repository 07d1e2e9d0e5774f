"""The memory of a device of TVM's runtime, and the time that calls on it take."""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import OsscompileError
from .tvm_runtime import load_device_runtime

EXISTS, TOTAL_MEMORY = 0, 14  # attributes of a device; the second in bytes that it may use
DEFAULT_STREAM = 0
# TVM's runtime copies through a buffer as large as the largest piece, and keeps the buffer.
PIECE_BYTES = 64 << 20


class TensorMemory:
    """Memory of the first device of a kind, one of `manifest.DEVICES`. Raises OsscompileError
    without TVM's runtime for that device, or without the device."""

    array_limit = None  # TVM's runtime does not tell

    def __init__(self, device: str) -> None:
        self._name = device
        ffi = load_device_runtime(device)
        self._device = ffi.device(device, 0)
        self._kind = self._device.dlpack_device_type()
        self._attribute = ffi.get_global_func("runtime.GetDeviceAttr")
        if not self._attribute(self._kind, 0, EXISTS):
            raise OsscompileError(
                f"{device}: expected a device, found none on this machine; choose a target of its "
                "CPU (`osscompile targets`)"
            )
        self._shape = ffi.Shape
        self._allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._view = ffi.get_global_func("runtime.TVMTensorCreateView")
        self._copy = ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._write = ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._read = ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        self._wait = ffi.get_global_func("runtime.Device_StreamSync")

    def room(self) -> int:
        """Bytes that may be used, by all that use the device."""
        return int(self._attribute(self._kind, 0, TOTAL_MEMORY))

    def tensor(self, array: Any) -> Any:
        """A tensor of the device: a copy of a numpy array, or one that it is already."""
        if not isinstance(array, np.ndarray):
            return array
        held = self.empty(array.shape, str(array.dtype))
        self._write_bytes(held, 0, array)
        return held

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        try:
            return self._allocate(self._shape(shape), dtype, self._device, None)
        except Exception as error:
            num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            raise OsscompileError(
                f"{self._name}: expected room for {num_bytes / 1e6:.1f} MB more, found: {error}; "
                "end what else uses it, or compile the model with a smaller --context"
            ) from error

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        array = self.empty(shape, dtype)
        self.clear(array, shape[0])
        return array

    def view(self, array: Any, shape: Sequence[int], dtype: str, begin: int = 0) -> Any:
        """A part of a tensor's memory, from byte `begin` on, as a tensor."""
        return self._view(array, self._shape(shape), dtype, begin)

    def write(self, array: Any, part: np.ndarray, start: int = 0) -> None:
        """Set elements along axis 0, from `start` on, to those of `part`, which has the tensor's
        type and its other extents."""
        size = _element_bytes(array)
        if part.flags.c_contiguous:
            self._write_bytes(array, start * size, part)
            return
        for i, row in enumerate(part, start):  # a copy of all may be too large
            self._write_bytes(array, i * size, np.ascontiguousarray(row))

    def copy(self, array: Any, source: int, target: int) -> None:
        """Set one element along axis 0 to what another is."""
        shape, dtype, size = array.shape[1:], str(array.dtype), _element_bytes(array)
        held, copied = (self.view(array, shape, dtype, i * size) for i in (source, target))
        self._copy(held, copied)

    def clear(self, array: Any, count: int, start: int = 0) -> None:
        """Set `count` elements along axis 0 to zero, from `start` on."""
        element = _element_bytes(array)
        zeros = np.zeros(min(count * element, PIECE_BYTES), np.uint8)
        for begin, size in _pieces(count * element):
            self._write_bytes(array, start * element + begin, zeros[:size])

    def numpy(self, result: Any) -> np.ndarray:
        """A copy of a tensor, after all that the device was told."""
        array = np.empty(tuple(result.shape), str(result.dtype))
        self._read(result, _address(array), array.nbytes)
        return array

    def synchronize(self) -> None:
        """Wait until the device has done all that it was told. Raises what TVM makes of an error of
        its driver, in any call before too: from then on the device does nothing."""
        self._wait(self._device, DEFAULT_STREAM)

    def seconds(self, function: Callable[..., object], calls: Sequence[Sequence[Any]]) -> float:
        """A call of a compiled function, on average, each with tensors of its own.

        By the host's clock, from an idle device until it is idle again: TVM's timers for devices
        are read at these two moments too, and take the same tensors for all calls. What the host
        takes to tell the device of a call is in it, and what it takes to wait for the device once
        in all calls: ask for many.
        """
        self.synchronize()
        start = time.perf_counter()
        for arguments in calls:
            function(*arguments)
        self.synchronize()
        return (time.perf_counter() - start) / len(calls)

    def _write_bytes(self, array: Any, begin: int, content: np.ndarray) -> None:
        """Set a tensor's memory from byte `begin` on; `content` is contiguous."""
        flat = content.reshape(-1).view(np.uint8)
        for offset, size in _pieces(flat.nbytes):
            piece = flat[offset : offset + size]
            held = self.view(array, [size], "uint8", begin + offset)
            self._write(held, _address(piece), size)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def _element_bytes(array: Any) -> int:
    """What one element along axis 0 takes."""
    return int(np.prod(array.shape[1:])) * np.dtype(str(array.dtype)).itemsize


def _pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    """(begin, size) of parts that are small enough to be copied."""
    for begin in range(0, num_bytes, PIECE_BYTES):
        yield begin, min(PIECE_BYTES, num_bytes - begin)
