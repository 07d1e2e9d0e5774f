"""Memory of a device that does not share it with the host."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .program import ITEM_BYTES, Launches, Program, evaluate


@dataclass
class Usage:
    """Bytes of a device's memory that are held now."""

    num_bytes: int = 0


class Memory:
    """Memory of a device, until this object goes; `handle` is what the device's library calls
    it."""

    def __init__(
        self, handle: Any, num_bytes: int, usage: Usage, free: Callable[[Any], object] | None = None
    ) -> None:
        self.handle, self.num_bytes = handle, num_bytes
        self._usage, self._free = usage, free
        usage.num_bytes += num_bytes

    def __del__(self) -> None:
        self._usage.num_bytes -= self.num_bytes
        if self._free is not None:
            self._free(self.handle)


@dataclass(frozen=True)
class DeviceArray:
    """An array in the device's memory."""

    memory: Memory
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.memory.num_bytes

    @property
    def element_bytes(self) -> int:
        """What one element along axis 0 takes."""
        return self.num_bytes // self.shape[0]


class DeviceMemory:
    """What programs and the KV cache do with a device's memory. How that is had, written, copied
    and filled, and how a program is run, a subclass says. `usage`: where what is held is
    counted."""

    array_limit: int | None = None  # bytes of the largest array that can be had, if it is known

    def __init__(self, programs: Mapping[str, Launches], usage: Usage) -> None:
        self.usage = usage
        self._programs = programs
        self._own: dict[str, dict[str, Sequence[Memory]]] = {}  # by the name of its program

    def tensor(self, array: Any) -> Memory:
        """Memory of the device: a copy of a numpy array's, or that of an array of the device."""
        if isinstance(array, DeviceArray):
            return array.memory
        memory = self._allocate(array.nbytes)
        self._write(memory, array, 0)
        return memory

    def numpy(self, result: DeviceArray) -> np.ndarray:
        """A copy of what a function returned, float32."""
        array = np.empty(result.shape, np.float32)
        self.read(result.memory, array)
        return array

    def zeros(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        array = DeviceArray(self._allocate(math.prod(shape) * np.dtype(dtype).itemsize), shape)
        self.clear(array, shape[0])
        return array

    def write(self, array: DeviceArray, part: np.ndarray, start: int = 0) -> None:
        """Set elements along axis 0, from `start` on, to those of `part`, which has the array's
        type and its other extents."""
        size = array.element_bytes
        if part.flags.c_contiguous:
            self._write(array.memory, part, start * size)
            return
        for i, row in enumerate(part, start):  # a copy of all may be too large
            self._write(array.memory, np.ascontiguousarray(row), i * size)

    def copy(self, array: DeviceArray, source: int, target: int) -> None:
        """Set one element along axis 0 to what another is."""
        size = array.element_bytes
        self._copy(array.memory, target * size, source * size, size)

    def clear(self, array: DeviceArray, count: int, start: int = 0) -> None:
        """Set `count` elements along axis 0 to zero, from `start` on."""
        if count:
            size = array.element_bytes
            self._zero(array.memory, start * size, count * size)

    def own_memory(self, name: str) -> dict[str, Sequence[Memory]]:
        """What a program has beside the memory that it is bound to, by the kind of a launch's
        argument."""
        if name not in self._own:
            program = self._programs[name]
            sizes: list[int] = []
            if isinstance(program, Program):
                shapes = ([evaluate(e, program.symbols) for e in i.shape] for i in program.inputs)
                sizes = [math.prod(shape) * ITEM_BYTES for shape in shapes]
            self._own[name] = {
                "input": [self._allocate(size) for size in sizes],
                "storage": [self._allocate(size) for size in program.storages],
            }
        return self._own[name]

    def run(
        self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Memory]
    ) -> DeviceArray:
        """Call a function with small inputs, int32, and memory bound before -> float32, until the
        next call of the function."""
        raise NotImplementedError

    def read(self, memory: Memory, array: np.ndarray) -> None:
        """Copy to a contiguous array of as many bytes, after all that was launched."""
        raise NotImplementedError

    def _allocate(self, num_bytes: int) -> Memory:
        """Raises OsscompileError without room."""
        raise NotImplementedError

    def _write(self, memory: Memory, array: np.ndarray, offset: int) -> None:
        raise NotImplementedError

    def _copy(self, memory: Memory, target: int, source: int, num_bytes: int) -> None:
        """Within a memory, to and from these offsets in bytes; they do not overlap."""
        raise NotImplementedError

    def _zero(self, memory: Memory, offset: int, num_bytes: int) -> None:
        raise NotImplementedError
