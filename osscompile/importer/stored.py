"""Rows of a tensor as a file holds them, and as numbers, whatever they are stored as."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..options import shown
from .encodings import ENCODINGS

MAX_FAULT = 1000  # of what is wrong with a file


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, checked against the file's size when it was opened.

    `encoding` names one of ENCODINGS; `offset` counts bytes from the start of the file.
    """

    path: Path
    name: str
    encoding: str
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: tensor {shown(self.name)}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the leading axis."""
        encoding = ENCODINGS[self.encoding]
        return math.prod(self.shape[1:]) // encoding.numbers * encoding.num_bytes

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the leading axis: [rows, bytes] uint8.

        Reads with a plain read instead of a mapping: memory in use is what was asked for, and a
        file that shrinks under us is an error instead of a signal. Raises CheckpointError.
        """
        count = (stop - start) * self.row_bytes
        offset = self.offset + start * self.row_bytes
        try:
            flat = np.fromfile(self.path, np.uint8, count, offset=offset)
        except OSError as error:
            raise CheckpointError(f"{self}: cannot be read: {error.strerror or error}") from error
        if flat.size != count:
            raise CheckpointError(
                f"{self}: expected {count} bytes from row {start}, found {flat.size}; "
                "the file shrank while it was read: download it again"
            )
        return flat.reshape(stop - start, self.row_bytes)

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the leading axis as bfloat16, or float32 if bfloat16 is less."""
        encoding = ENCODINGS[self.encoding]
        blocks = self.raw(start, stop).reshape(-1, encoding.num_bytes)
        return encoding.decode(blocks).reshape(stop - start, *self.shape[1:])

    def with_leading_axis(self) -> "Stored":
        """The same bytes as one row: of a stack of such tensors a part."""
        return Stored(self.path, self.name, self.encoding, (1, *self.shape), self.offset)


@dataclass(frozen=True)
class Rows:
    """Tensors one below the other along their leading axis, equal in the others."""

    parts: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def encodings(self) -> set[str]:
        return {part.encoding for part in self.parts}

    def raw(self, start: int, stop: int) -> np.ndarray:
        """As `Stored.raw`; only where all parts have the same encoding."""
        return _join([part.raw(first, last) for part, first, last in self._cut(start, stop)])

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """As `Stored.numbers`; float32 if one of the parts is."""
        return _join([part.numbers(first, last) for part, first, last in self._cut(start, stop)])

    def _cut(self, start: int, stop: int) -> list[tuple[Stored, int, int]]:
        """The parts of which rows are wanted (one if none are), and which rows."""
        cuts = []
        first = 0
        for part in self.parts:
            begin, end = (min(max(row - first, 0), part.shape[0]) for row in (start, stop))
            if begin < end:
                cuts.append((part, begin, end))
            first += part.shape[0]
        return cuts or [(self.parts[0], 0, 0)]


def _join(pieces: list[np.ndarray]) -> np.ndarray:
    if len({piece.dtype for piece in pieces}) > 1:  # numpy promotes no bfloat16
        pieces = [piece.astype(np.float32) for piece in pieces]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
