"""Products of bytes by the instruction that sums four of them: a thread computes whole sums."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from .packed_bytes import dot_by_instruction
from .shared import WORDS, place

SIDE = 8
THREADS = SIDE * SIDE  # of a work-group that computes a tile
ROWS_EACH = (1, 2, 4, 8)  # of a thread
COLUMNS_EACH = (1, 2, 4, 8)
COLUMNS_WANTED = 4  # of both halves together
TILE_ROWS = SIDE  # of a tile, for each of a thread's
TILE_COLUMNS = SIDE


def row(thread: Expr, r: Expr, rows: int) -> Expr:
    """Of the tile: row `r` of the `rows` of a thread."""
    return r * SIDE + thread // SIDE


def column(thread: Expr, c: Expr, columns: int) -> Expr:
    return c * SIDE + thread % SIDE


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Statements that add the products of a block to total [halves, rows, columns] int32.

    `x` [depth, digits, rows of the tile, WORDS] and `weight` [depth, halves x columns of the tile,
    WORDS] uint32 hold blocks, see `shared.py`.
    """

    def dot_of(x: Buffer, weight: Buffer, b: Expr, digit: Expr, *at: Expr) -> Expr:
        t, w, k = at
        return dot_by_instruction(x[b, digit, t, place(t, k)], weight[b, w, place(w, k)])

    @T.macro
    def multiply(total, x, weight, thread, b, digit):  # type: ignore[no-untyped-def]
        for k in T.unroll(WORDS):
            for h in T.unroll(halves):
                for r in T.unroll(rows):
                    for c in T.unroll(columns):
                        total[h, r, c] += dot_of(
                            x,
                            weight,
                            b,
                            digit,
                            row(thread, r, rows),
                            h * columns * SIDE + column(thread, c, columns),
                            k,
                        )

    return multiply  # type: ignore[no-any-return]
