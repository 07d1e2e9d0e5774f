"""Products of float16 by the matrix units of NVIDIA's GPUs: a warp multiplies 16 rows x 16 inputs
with 8 columns x 16 inputs, and every lane holds 2 x 2 of the sums, float32, as in `mma.py`.

The names are those of functions that a target's source begins with. `MMA` takes the addresses of a
lane's four sums, and the lane's words of the rows (4) and of the columns (2): a word is two inputs.
`LOAD`(words, memory, word) reads four matrices of 8 rows x 16 bytes from shared memory; a lane says
at which word one row begins (`loaded_row`), and gets a word of each matrix, in which two rows are
the two inputs of a column. Lanes hold what NVIDIA's description of PTX says for mma.m16n8k16.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from .mma import WARP, product

MMA = "mma_16x8x16"
LOAD = "load_transposed"
PACK = "pack_f16x2"  # rounds two float32 into a word, the first into the lower half
EXP2 = "exp2_approximately"

ROWS, COLUMNS, DEPTH = 16, 8, 16
LOADED_COLUMNS = 16  # by one `LOAD`, of so many inputs


def row(thread: Expr, side: Expr) -> Expr:
    """Return the row of a lane's sums 2 `side` and 2 `side` + 1."""
    return thread % WARP // 4 + side * 8


def first_column(thread: Expr) -> Expr:
    """Return the column of a lane's sums 0 and 2; 1 and 3 are of the next one. Inputs are alike: a
    word of rows is of these two inputs of the first 8 or of the last 8."""
    return thread % 4 * 2


def loaded_row(thread: Expr) -> tuple[Expr, Expr]:
    """Return which input, of 16, and which half of the 16 columns a lane tells `LOAD` of, so that
    the words are those of the first 8 columns and then of the last 8."""
    matrix = thread % WARP // 8
    return matrix % 2 * 8 + thread % 8, matrix // 2


def multiply(bands: int) -> Callable[..., object]:
    """Return statements that add to sums [bands, columns / 8, 4] the products of the k-th 16 inputs
    of rows [bands, inputs / 16, 4] with those of the n-th 16 columns, which `words` [4] has."""

    @T.macro
    def multiply(sums, rows, words, k, n):  # type: ignore[no-untyped-def]
        for band in T.unroll(bands):
            for half in T.unroll(2):
                T.evaluate(
                    product(
                        MMA,
                        lambda i: sums[band, n * 2 + half, i],
                        lambda i: rows[band, k, i],
                        lambda i: words[half * 2 + i],
                    )
                )

    return multiply  # type: ignore[no-any-return]
