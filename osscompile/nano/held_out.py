"""The numbers, names and values that nano never sees in training."""

import zlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def is_held_out(key: str) -> bool:
    """Whether a key (a number pair, a name and its value) is in the held-out twentieth."""
    return zlib.crc32(key.encode()) % 20 == 0


def draw_until(held_out: bool, draw: Callable[[], T], key: Callable[[T], str]) -> T:
    """Draw until a value is on the wanted side of the split."""
    while True:
        value = draw()
        if is_held_out(key(value)) == held_out:
            return value
