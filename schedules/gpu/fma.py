"""Products of float32 one by one: a thread computes whole sums."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK

SIDE = 8
THREADS = SIDE * SIDE  # in a work-group, which computes a tile
ROWS_EACH = (1, 2, 4, 8)  # that a thread computes
ROWS_WANTED = 4
COLUMNS_EACH = (1, 2, 4, 8)
COLUMNS_WANTED = 4  # in both halves together
TILE_ROWS = SIDE  # of a tile for each row of a thread
TILE_COLUMNS = SIDE
SCOPE = "local"  # of the sums
ANY_WEIGHT = True


def shape(count: int) -> tuple[int, int]:
    """Return the shape in shared memory of a block of inputs of `count` rows or columns."""
    return (BLOCK, count)


def place(k: Expr, t: Expr) -> tuple[Expr, Expr]:
    """Return where input k of row or column t lies in that shape."""
    return (k, t)


def sums_shape(halves: int, rows: int, columns: int) -> tuple[int, ...]:
    return (halves, rows, columns)


def clear(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Return statements that set the sums to zero."""

    @T.macro
    def clear(sums):  # type: ignore[no-untyped-def]
        for h, r, c in T.grid(halves, rows, columns):
            sums[h, r, c] = T.float32(0)

    return clear  # type: ignore[no-any-return]


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Return statements that add the products of a block: `x` holds the tile's rows, `weight` its
    columns, with both halves side by side."""

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
    """Return statements that call `keep` (at, row, num_columns, column_of(c), sum_of(half, c)) for
    every sum; rows and columns are the tile's, and `at` is passed through."""

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
    """Return `keep_each` for threads that hold sums [half, row, column]; `row` and `column` take
    (thread, number), and name rows and columns of the tile."""

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
