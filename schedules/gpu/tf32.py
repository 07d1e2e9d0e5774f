"""Products of float32 by the matrix units of NVIDIA's GPUs: a warp multiplies 16 rows x 8 inputs
with 8 columns x 8 inputs, and every lane holds 2 x 2 of the sums, as in `mma.py`.

The units read the upper 19 bits of a float32 (TF32: 11 of its 24 bits of precision). So a number
of the rows is split into two, the products of both are added, and 22 bits count; those of the
columns must have no more than 11: float16 and bfloat16 have not.

`MMA` names a function that a target's source begins with, of the addresses of a lane's four sums,
float32, and of the bits, uint32, of its numbers of the rows (4) and of the columns (2). Which lane
holds what is that of mma.m16n8k8 in NVIDIA's description of PTX.
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
DEPTH = 8  # inputs of a product
ROWS_WANTED = 4
COLUMNS_WANTED = 8  # of both halves together
SCOPE = "local"  # of the sums
ANY_WEIGHT = False  # but bfloat16
STRIDE = BLOCK + 4  # so that a lane's numbers lie in a bank of their own, of which there are 32
_UPPER_BITS = 0xFFFFE000


def shape(count: int) -> tuple[int, int]:
    """Of a block of inputs of `count` rows or columns, in shared memory."""
    return (count, STRIDE)


def place(k: Expr, t: Expr) -> tuple[Expr, Expr]:
    """Where input k of row or column t lies there."""
    return (t, k)


def upper(number: Expr) -> Expr:
    """The bits, uint32, that the units read of a float32."""
    return T.reinterpret(number, dtype="uint32") & const(_UPPER_BITS, "uint32")


def rest(number: Expr) -> Expr:
    """The bits of what they leave."""
    return T.reinterpret(number - T.reinterpret(upper(number), dtype="float32"), dtype="uint32")


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Statements that add the products of a block, `x` of the tile's rows and `weight` of its
    columns, those of both halves side by side."""

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
    """Statements that call `keep` (at, row, num_columns, column_of(c), sum_of(half, c)) for every
    sum, of rows and columns of the tile; `at` is what they were given."""

    return keep_all(
        rows,
        columns,
        lambda thread, r: row(thread, r, rows),
        lambda thread, c: column(thread, c, columns),
        keep,
    )
