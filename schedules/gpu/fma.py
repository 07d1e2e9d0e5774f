"""Products of float32 one by one: a thread computes whole sums."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK

SIDE = 8
THREADS = SIDE * SIDE  # of a work-group that computes a tile
ROWS_EACH = (1, 2, 4, 8)  # of a thread
ROWS_WANTED = 4
COLUMNS_EACH = (1, 2, 4, 8)
COLUMNS_WANTED = 4  # of both halves together
TILE_ROWS = SIDE  # of a tile, for each of a thread's
TILE_COLUMNS = SIDE
SCOPE = "local"  # of the sums
ANY_WEIGHT = True


def shape(count: int) -> tuple[int, int]:
    """Of a block of inputs of `count` rows or columns, in shared memory."""
    return (BLOCK, count)


def place(k: Expr, t: Expr) -> tuple[Expr, Expr]:
    """Where input k of row or column t lies there."""
    return (k, t)


def sums_shape(halves: int, rows: int, columns: int) -> tuple[int, ...]:
    return (halves, rows, columns)


def clear(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Statements that set the sums to zero."""

    @T.macro
    def clear(sums):  # type: ignore[no-untyped-def]
        for h, r, c in T.grid(halves, rows, columns):
            sums[h, r, c] = T.float32(0)

    return clear  # type: ignore[no-any-return]


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Statements that add the products of a block, `x` of the tile's rows and `weight` of its
    columns, those of both halves side by side."""

    @T.macro
    def multiply(sums, x, weight, thread):  # type: ignore[no-untyped-def]
        for k in range(T.int64(BLOCK)):
            for h in T.unroll(halves):
                for r in T.unroll(rows):
                    for c in T.unroll(columns):
                        sums[h, r, c] += (
                            x[k, r * SIDE + thread // SIDE]
                            * weight[k, (h * columns + c) * SIDE + thread % SIDE]
                        )

    return multiply  # type: ignore[no-any-return]


def keep_each(
    halves: int, rows: int, columns: int, keep: Callable[..., object]
) -> Callable[..., object]:
    """Statements that call `keep` (at, row, num_columns, column_of(c), sum_of(half, c)) for every
    sum, of rows and columns of the tile; `at` is what they were given."""

    def row(thread: Expr, r: Expr) -> Expr:
        return r * SIDE + thread // SIDE

    def column(thread: Expr, c: Expr) -> Expr:
        return c * SIDE + thread % SIDE

    return keep_all(rows, columns, row, column, keep)


def keep_all(
    rows: int,
    columns: int,
    row: Callable[[Expr, Expr], Expr],
    column: Callable[[Expr, Expr], Expr],
    keep: Callable[..., object],
) -> Callable[..., object]:
    """The same, of threads that hold sums [half, row, column] of the rows and columns that `row`
    and `column` (thread, number of it) name."""

    @T.macro
    def keep_each(sums, thread, at):  # type: ignore[no-untyped-def]
        for r in T.unroll(rows):
            keep(
                at,
                row(thread, r),
                columns,
                lambda c: column(thread, c),
                lambda half, c: sums[half, r, c],
            )

    return keep_each  # type: ignore[no-any-return]
