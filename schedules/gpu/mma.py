"""Products of bytes by the matrix units of NVIDIA's GPUs: a warp multiplies 16 rows x 32 bytes with
8 columns x 32 bytes, a whole block, and every lane holds 2 x 2 of the sums.

`MMA` names a function that a target's source begins with, of the addresses of a lane's four sums,
int32, and of its words of the rows (4) and of the columns (2). Which lane holds what is that of
mma.m16n8k32 in NVIDIA's description of PTX.
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
ROWS_EACH = (2, 4, 8)  # of a thread
COLUMNS_EACH = (2, 4, 8)
COLUMNS_WANTED = 8  # of both halves together
TILE_ROWS = WARPS * 8  # of a tile, for each of a thread's
TILE_COLUMNS = WARPS * 4


def row(thread: Expr, r: Expr, rows: int) -> Expr:
    """Of the tile: row `r` of the `rows` of a thread."""
    return thread // (WARPS * WARP) * rows * 8 + r * 8 + thread % WARP // 4


def column(thread: Expr, c: Expr, columns: int) -> Expr:
    return thread // WARP % WARPS * columns * 4 + c // 2 * 8 + thread % 4 * 2 + c % 2


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Statements that add the products of a block to total [halves, rows, columns] int32.

    `x` [depth, digits, rows of the tile, WORDS] and `weight` [depth, halves x columns of the tile,
    WORDS] uint32 hold blocks, see `shared.py`.
    """

    def x_word(x: Buffer, b: Expr, digit: Expr, thread: Expr, r: int, half: int) -> Expr:
        t = row(thread, r, rows)
        return x[b, digit, t, place(t, thread % 4 + 4 * half)]

    def weight_word(weight: Buffer, b: Expr, h: Expr, thread: Expr, n: Expr, half: int) -> Expr:
        first = thread // WARP % WARPS * columns * 4 + n * 8
        w = h * columns * TILE_COLUMNS + first + thread % WARP // 4
        return weight[b, w, place(w, thread % 4 + 4 * half)]

    @T.macro
    def multiply(total, x, weight, thread, b, digit):  # type: ignore[no-untyped-def]
        for h in T.unroll(halves):
            for m in T.unroll(rows // 2):
                for n in T.unroll(columns // 2):
                    T.evaluate(
                        T.call_extern(
                            "void",
                            MMA,
                            T.address_of(total[h, 2 * m, 2 * n]),
                            T.address_of(total[h, 2 * m, 2 * n + 1]),
                            T.address_of(total[h, 2 * m + 1, 2 * n]),
                            T.address_of(total[h, 2 * m + 1, 2 * n + 1]),
                            x_word(x, b, digit, thread, 2 * m, 0),
                            x_word(x, b, digit, thread, 2 * m + 1, 0),
                            x_word(x, b, digit, thread, 2 * m, 1),
                            x_word(x, b, digit, thread, 2 * m + 1, 1),
                            weight_word(weight, b, h, thread, n, 0),
                            weight_word(weight, b, h, thread, n, 1),
                        )
                    )

    return multiply  # type: ignore[no-any-return]
