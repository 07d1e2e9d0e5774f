"""What a model yields, for one thread at a time."""

from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

from .errors import InputError

T = TypeVar("T")
R = TypeVar("R")


class Stream(Generic[T], Iterator[T]):
    """A generator whose error is ours when it is asked while another thread waits for it."""

    def __init__(self, generator: Generator[T, None, None]) -> None:
        self._generator = generator

    def __next__(self) -> T:
        return self._alone(self._generator.__next__)

    def close(self) -> None:
        """End it; what was said of it stays in the KV cache."""
        self._alone(self._generator.close)

    def _alone(self, ask: Callable[[], R]) -> R:
        try:
            return ask()
        except ValueError as error:  # Python's own has no type of its own
            if str(error) != "generator already executing":
                raise
        raise InputError(
            "generation: expected one thread at a time, found another that waits for its next "
            "piece; read it in one thread, or hold a lock"
        )
