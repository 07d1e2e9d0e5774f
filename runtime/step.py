"""What a step of the model is told: its rows, which of them attention may compute together, and
which logits are wanted. The functions of an artifact are steps for so many rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Consecutive positions of a sequence that attention may compute together, at most. Kernels are
# compiled for it: another number is another format of the artifact.
TILE_ROWS = 16
ANY = "step"  # of any number of rows
FEW = {n: f"step_{n}" for n in (1, 2, 4, 8)}  # of so many, whose logits are all wanted
FUNCTIONS = (ANY, *FEW.values())


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one sequence, from a position on.

    `table`: where the sequence's table of pages begins; `wanted`: of how many of the last tokens
    the logits are wanted.
    """

    ids: Sequence[int]
    position: int
    table: int = 0
    wanted: int = 1


def step_inputs(parts: Sequence[Part]) -> tuple[str, list[np.ndarray]]:
    """The function for these rows and its inputs, int32: rows [n, 3] of (token, position, table),
    and for any number tiles [t, 2] of (first row, rows), and wanted [w]. The first logits are those
    of the wanted rows, in order; of the last row if none is wanted. A few rows are filled up with
    the last of them."""
    rows = np.concatenate([_rows(part) for part in parts])
    if len(rows) <= max(FEW) and all(part.wanted == len(part.ids) for part in parts):
        count = next(count for count in FEW if count >= len(rows))
        return FEW[count], [rows[np.minimum(np.arange(count), len(rows) - 1)]]
    tiles: list[tuple[int, int]] = []
    wanted: list[int] = []
    first = 0
    for part in parts:
        end = first + len(part.ids)
        tiles += [(row, min(TILE_ROWS, end - row)) for row in range(first, end, TILE_ROWS)]
        wanted += range(end - part.wanted, end)
        first = end
    wanted = wanted or [len(rows) - 1]  # a step has one at least
    return ANY, [rows, np.array(tiles, np.int32), np.array(wanted, np.int32)]


def _rows(part: Part) -> np.ndarray:
    rows = np.empty((len(part.ids), 3), np.int32)
    rows[:, 0] = part.ids
    rows[:, 1] = np.arange(part.position, part.position + len(part.ids))
    rows[:, 2] = part.table
    return rows
