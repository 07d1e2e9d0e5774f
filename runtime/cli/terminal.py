"""What commands print alike: tables, and what is under way."""

import sys
from collections.abc import Sequence


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of as many cells, each column as wide as it must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        *cells, last = row
        padded = [f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=False)]
        print("".join(padded) + last)


def say_stage(stage: str) -> None:
    """On one line of a terminal, each in the place of the one before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{stage}", end="", file=sys.stderr, flush=True)
