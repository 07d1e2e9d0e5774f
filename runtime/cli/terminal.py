"""What commands print alike: tables, and what is under way; and what a terminal can show."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from ..errors import printable


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of as many cells, each column as wide as it must be. Names in them may be anybody's."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        *cells, last = row
        padded = [f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=False)]
        print("".join(padded) + last)


def say_stage(stage: str) -> None:
    """On one line of a terminal, each in the place of the one before."""
    if takes_codes(sys.stderr):
        print(f"\r\033[K{stage}", end="", file=sys.stderr, flush=True)


def dims_text(stream: TextIO) -> bool:
    """Whether text there may be dimmed: on a terminal, unless NO_COLOR forbids it."""
    return takes_codes(stream) and not os.environ.get("NO_COLOR")


def takes_codes(stream: TextIO) -> bool:
    """Whether it is a terminal that obeys codes; of one that says nothing of itself nobody knows
    that."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
