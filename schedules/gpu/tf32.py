"""Products of float32 by the matrix units of NVIDIA's GPUs: a warp multiplies 16 rows x 8 inputs
with 8 columns x 8 inputs, and every lane holds 2 x 2 of the sums, as in `mma.py`.

The units read the upper 19 bits of a float32 (TF32: 11 of its 24 bits of precision). So each number
of the rows is split into two, whose products are added, and 22 bits count. The numbers of the
columns may have 11 bits at most: float16 and bfloat16 have no more.

`MMA` names a function that a target's source begins with. It takes the addresses of a lane's four
sums, float32, and the bits, uint32, of the lane's numbers of the rows (4) and of the columns (2).
Lanes hold what NVIDIA's description of PTX says for mma.m16n8k8.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK, const
from .fma import clear as clear
from .fma import keep_all
from .fma import sums_shape as sums_shape
from .mma import COLUMNS_EACH as COLUMNS_EACH
from .mma import ROWS_EACH as ROWS_EACH
from .mma import THREADS as THREADS
from .mma import TILE_COLUMNS as TILE_COLUMNS
from .mma import TILE_ROWS as TILE_ROWS
from .mma import WARP, WARPS, column, product, row

MMA = "mma_16x8x8"
DEPTH = 8  # inputs in a product
ROWS_WANTED = 4
COLUMNS_WANTED = 8  # in both halves together
SCOPE = "local"  # of the sums
ANY_WEIGHT = False  # only bfloat16
STRIDE = BLOCK + 4  # so that a lane's numbers lie in a bank of their own, of which there are 32
_UPPER_BITS = 0xFFFFE000


def shape(count: int) -> tuple[int, int]:
    """Return the shape in shared memory of a block of inputs of `count` rows or columns."""
    return (count, STRIDE)


def place(k: Expr, t: Expr) -> tuple[Expr, Expr]:
    """Return where input k of row or column t lies in that shape."""
    return (t, k)


def upper(number: Expr) -> Expr:
    """Return the bits of a float32 that the units read, as uint32."""
    return T.reinterpret(number, dtype="uint32") & const(_UPPER_BITS, "uint32")


def rest(number: Expr) -> Expr:
    """Return the bits of the number's remainder, which `upper` leaves out."""
    return T.reinterpret(number - T.reinterpret(upper(number), dtype="float32"), dtype="uint32")


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Return statements that add the products of a block: `x` holds the tile's rows, `weight` its
    columns, with both halves side by side."""

    def x_at(x: Buffer, thread: Expr, m: Expr, k: Expr, i: Expr) -> Expr:
        return x[row(thread, m * 2 + i % 2, rows), k * DEPTH + thread % 4 + i // 2 * 4]

    def weight_at(weight: Buffer, thread: Expr, h: Expr, n: Expr, k: Expr, i: int) -> Expr:
        first = h * columns * TILE_COLUMNS + thread // WARP % WARPS * columns * 4 + n * 8
        number = weight[first + thread % WARP // 4, k * DEPTH + thread % 4 + i * 4]
        return T.reinterpret(number, dtype="uint32")

    @T.macro
    def multiply(sums, x, weight, thread):  # type: ignore[no-untyped-def]
        parts = T.alloc_buffer((2, 4), "uint32", scope="local")
        for k in range(T.int64(BLOCK // DEPTH)):
            for m in T.unroll(rows // 2):
                for i in T.unroll(4):
                    parts[0, i] = upper(x_at(x, thread, m, k, i))
                    parts[1, i] = rest(x_at(x, thread, m, k, i))
                for h in T.unroll(halves):
                    for n in T.unroll(columns // 2):
                        for part in T.unroll(2):
                            T.evaluate(
                                product(
                                    MMA,
                                    lambda i: sums[h, 2 * m + i // 2, 2 * n + i % 2],
                                    lambda i: parts[part, i],
                                    lambda i: weight_at(weight, thread, h, n, k, i),
                                )
                            )

    return multiply  # type: ignore[no-any-return]


def keep_each(
    halves: int, rows: int, columns: int, keep: Callable[..., object]
) -> Callable[..., object]:
    """Return statements that call `keep` (at, row, num_columns, column_of(c), sum_of(half, c)) for
    every sum; rows and columns are the tile's, and `at` is passed through."""

    return keep_all(
        rows,
        columns,
        lambda thread, r: row(thread, r, rows),
        lambda thread, c: column(thread, c, columns),
        keep,
    )
