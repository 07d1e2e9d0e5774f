"""What commands print alike: tables, and what is under way."""

import sys
from collections.abc import Sequence


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Names, and what they stand for, in a column each."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def say_stage(stage: str) -> None:
    """On one line of a terminal, each in the place of the one before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{stage}", end="", file=sys.stderr, flush=True)
