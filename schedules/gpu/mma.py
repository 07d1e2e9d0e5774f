"""Products of bytes by the matrix units of NVIDIA's GPUs: a warp multiplies 16 rows x 32 bytes with
8 columns x 32 bytes, a whole block, and every lane holds 2 x 2 of the sums.

`MMA` names a function that a target's source begins with. It takes the addresses of a lane's four
sums, int32, and the lane's words of the rows (4) and of the columns (2). Lanes hold what NVIDIA's
description of PTX says for mma.m16n8k32.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from .shared import place

MMA = "mma_16x8x32"
WARP = 32
WARPS = 2  # along rows, and along columns
THREADS = WARPS * WARPS * WARP
ROWS_EACH = (2, 4, 8)  # that a thread computes
ROWS_TOGETHER = 2  # of a thread, in one product
COLUMNS_EACH = (2, 4, 8)
COLUMNS_WANTED = 8  # in both halves together
TILE_ROWS = WARPS * 8  # of a tile for each row of a thread
TILE_COLUMNS = WARPS * 4


def row(thread: Expr, r: Expr, rows: int) -> Expr:
    """Return row `r` of a thread's `rows` as a row of the tile."""
    return thread // (WARPS * WARP) * rows * 8 + r * 8 + thread % WARP // 4


def column(thread: Expr, c: Expr, columns: int) -> Expr:
    return thread // WARP % WARPS * columns * 4 + c // 2 * 8 + thread % 4 * 2 + c % 2


def product(
    instruction: str,
    sum_of: Callable[[int], Expr],
    row_of: Callable[[int], Expr],
    column_of: Callable[[int], Expr],
) -> Expr:
    """Call `instruction` with a lane's four sums and its words of the rows and columns."""
    sums = (T.address_of(sum_of(i)) for i in range(4))
    words = (*map(row_of, range(4)), *map(column_of, range(2)))
    return T.call_extern("void", instruction, *sums, *words)


def span(thread: Expr, m: Expr, rows: int) -> tuple[Expr, Expr]:
    """Return the first and last row of the tile that a warp multiplies together the m-th time."""
    first = thread // (WARPS * WARP) * rows * 8 + m * 16
    return first, first + 15


def fragment_shape(halves: int, columns: int) -> tuple[int, ...]:
    """Return the shape of a lane's words of a block's columns."""
    return (halves, columns // 2, 2)


def load(halves: int, columns: int) -> Callable[..., object]:
    """Return statements that load the `fragment` of block `b` from `weight` uint32 [depth, halves x
    columns of the tile, WORDS]; see `shared.py`."""

    def word(weight: Buffer, thread: Expr, b: Expr, h: Expr, n: Expr, half: Expr) -> Expr:
        first = thread // WARP % WARPS * columns * 4 + n * 8
        w = h * columns * TILE_COLUMNS + first + thread % WARP // 4
        return weight[b, w, place(w, thread % 4 + 4 * half)]

    @T.macro
    def load(fragment, weight, thread, b):  # type: ignore[no-untyped-def]
        for h in T.unroll(halves):
            for n in T.unroll(columns // 2):
                for half in T.unroll(2):
                    fragment[h, n, half] = word(weight, thread, b, h, n, half)

    return load  # type: ignore[no-any-return]


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Return statements that multiply a thread's rows of the m-th time by the `fragment` and add up
    the products in total [halves, ROWS_TOGETHER, columns] int32.

    `x` [depth, digits, rows of the tile, WORDS] uint32 holds blocks; see `shared.py`.
    """

    def word(x: Buffer, thread: Expr, b: Expr, digit: Expr, r: Expr, half: int) -> Expr:
        t = row(thread, r, rows)
        return x[b, digit, t, place(t, thread % 4 + 4 * half)]

    @T.macro
    def multiply(total, x, fragment, thread, b, digit, m):  # type: ignore[no-untyped-def]
        for h in T.unroll(halves):
            for n in T.unroll(columns // 2):
                T.evaluate(
                    product(
                        MMA,
                        lambda i: total[h, i // 2, 2 * n + i % 2],
                        lambda i: word(x, thread, b, digit, 2 * m + i % 2, i // 2),
                        lambda i: fragment[h, n, i],
                    )
                )

    return multiply  # type: ignore[no-any-return]
