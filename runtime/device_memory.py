"""Memory of a device that does not share it with the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .program import ITEM_BYTES, Program, evaluate


@dataclass(frozen=True)
class DeviceArray:
    """An array in the device's memory; `memory` is what the device's library calls it."""

    memory: Any
    shape: tuple[int, ...]
    num_bytes: int


class DeviceMemory:
    """What programs and the KV cache do with a device's memory. How that is had, written, copied
    and filled, a subclass says: memory is freed with the last object that holds it."""

    def tensor(self, array: Any) -> Any:
        """Memory of the device: a copy of a numpy array's, or that of an array from `zeros`."""
        if isinstance(array, DeviceArray):
            return array.memory
        memory = self._allocate(array.nbytes)
        self._write(memory, array)
        return memory

    def zeros(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        array = DeviceArray(self._allocate(num_bytes), shape, num_bytes)
        self.clear(array, shape[1])
        return array

    def copy(self, array: DeviceArray) -> DeviceArray:
        saved = DeviceArray(self._allocate(array.num_bytes), array.shape, array.num_bytes)
        self.restore(saved, array)
        return saved

    def restore(self, array: DeviceArray, saved: DeviceArray) -> None:
        self._copy(array.memory, saved.memory, array.num_bytes)

    def clear(self, array: DeviceArray, count: int) -> None:
        """Set the first `count` along axis 1 to zero, or all if there are fewer."""
        row_bytes = array.num_bytes // array.shape[0]
        size = row_bytes // array.shape[1] * min(count, array.shape[1])
        if size:
            for offset in range(0, array.num_bytes, row_bytes):
                self._zero(array.memory, offset, size)

    def memory_of(self, program: Program, bound: Sequence[Any]) -> dict[str, Sequence[Any]]:
        """All memory of a program, by the kind of a launch's argument."""
        sizes = [evaluate(size, program.max_tokens) * ITEM_BYTES for size in program.inputs]
        return {
            "input": [self._allocate(size) for size in sizes],
            "bound": bound,
            "storage": [self._allocate(size) for size in program.storages],
        }

    def _allocate(self, num_bytes: int) -> Any:
        """Raises OsscompileError without room."""
        raise NotImplementedError

    def _write(self, memory: Any, array: np.ndarray) -> None:
        raise NotImplementedError

    def _copy(self, memory: Any, source: Any, num_bytes: int) -> None:
        raise NotImplementedError

    def _zero(self, memory: Any, offset: int, num_bytes: int) -> None:
        raise NotImplementedError
