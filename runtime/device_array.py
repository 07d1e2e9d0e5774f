"""Arrays in the memory of a device that does not share it with the host."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DeviceArray:
    """An array in the device's memory; `memory` is what the device's library calls it."""

    memory: Any
    shape: tuple[int, ...]
    num_bytes: int


def allocate(shape: tuple[int, ...], dtype: str, memory_of: Callable[[int], Any]) -> DeviceArray:
    """An array whose contents are undefined; `memory_of` so many bytes."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return DeviceArray(memory_of(num_bytes), shape, num_bytes)


def clear_ranges(array: DeviceArray, count: int) -> Iterator[tuple[int, int]]:
    """(offset, size) in bytes of the first `count` along axis 1, or of all if there are fewer."""
    row_bytes = array.num_bytes // array.shape[0]
    size = row_bytes // array.shape[1] * min(count, array.shape[1])
    if size:
        for offset in range(0, array.num_bytes, row_bytes):
            yield offset, size
