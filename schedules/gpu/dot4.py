"""Products of bytes by the instruction that sums four of them: a thread computes whole sums."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from .packed_bytes import dot_by_instruction
from .shared import WORDS, place

SIDE = 8
THREADS = SIDE * SIDE  # in a work-group, which computes a tile
ROWS_EACH = (1, 2, 4, 8)  # that a thread computes
ROWS_TOGETHER = 1
COLUMNS_EACH = (1, 2, 4, 8)
COLUMNS_WANTED = 4  # in both halves together
TILE_ROWS = SIDE  # of a tile for each row of a thread
TILE_COLUMNS = SIDE


def row(thread: Expr, r: Expr, rows: int) -> Expr:
    """Return row `r` of a thread's `rows` as a row of the tile."""
    return r * SIDE + thread // SIDE


def column(thread: Expr, c: Expr, columns: int) -> Expr:
    return c * SIDE + thread % SIDE


def span(thread: Expr, m: Expr, rows: int) -> tuple[Expr, Expr]:
    """Return the first and last row of the tile that are multiplied together the m-th time."""
    return m * SIDE, m * SIDE + (SIDE - 1)


def fragment_shape(halves: int, columns: int) -> tuple[int, ...]:
    """Return the shape of a thread's words of a block's columns."""
    return (halves, columns, WORDS)


def load(halves: int, columns: int) -> Callable[..., object]:
    """Return statements that load the `fragment` of block `b` from `weight` uint32 [depth, halves x
    columns of the tile, WORDS]; see `shared.py`."""

    def word(weight: Buffer, thread: Expr, b: Expr, h: Expr, c: Expr, k: Expr) -> Expr:
        w = h * columns * SIDE + column(thread, c, columns)
        return weight[b, w, place(w, k)]

    @T.macro
    def load(fragment, weight, thread, b):  # type: ignore[no-untyped-def]
        for h in T.unroll(halves):
            for c in T.unroll(columns):
                for k in T.unroll(WORDS):
                    fragment[h, c, k] = word(weight, thread, b, h, c, k)

    return load  # type: ignore[no-any-return]


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Return statements that multiply a thread's rows of the m-th time by the `fragment` and add up
    the products in total [halves, ROWS_TOGETHER, columns] int32.

    `x` [depth, digits, rows of the tile, WORDS] uint32 holds blocks; see `shared.py`.
    """

    def word(x: Buffer, thread: Expr, b: Expr, digit: Expr, m: Expr, k: Expr) -> Expr:
        t = row(thread, m, rows)
        return x[b, digit, t, place(t, k)]

    @T.macro
    def multiply(total, x, fragment, thread, b, digit, m):  # type: ignore[no-untyped-def]
        for k in T.unroll(WORDS):
            for h in T.unroll(halves):
                for c in T.unroll(columns):
                    total[h, 0, c] += dot_by_instruction(
                        word(x, thread, b, digit, m, k), fragment[h, c, k]
                    )

    return multiply  # type: ignore[no-any-return]
