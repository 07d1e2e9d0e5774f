"""Products of float32 by the matrix units of Apple's GPUs: a SIMD-group multiplies matrices of 8x8,
which its lanes hold together; which lane holds which element is not documented.

So the sums of a matrix go into shared memory, from where each lane takes two.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK

SIMD_GROUP = 32  # threads in one
GROUPS = 2  # SIMD-groups along rows, and along columns
THREADS = GROUPS * GROUPS * SIMD_GROUP
SIDE = 8  # of a matrix
ROWS_EACH = (1, 2, 4)  # that a thread takes: one of each matrix
ROWS_WANTED = 2
COLUMNS_EACH = (2, 4, 8)  # that a thread takes: two of each matrix
COLUMNS_WANTED = 8  # in both halves together
TILE_ROWS = GROUPS * SIDE  # of a tile for each row of a thread
TILE_COLUMNS = GROUPS * SIDE // 2
SCOPE = "metal.simdgroup"  # of the sums
ANY_WEIGHT = True
STRIDE = BLOCK + 4  # so that the rows of a matrix lie in different banks, of which there are 32


def shape(count: int) -> tuple[int, int]:
    """Return the shape in shared memory of a block of inputs of `count` rows or columns."""
    return (count, STRIDE)


def place(k: Expr, t: Expr) -> tuple[Expr, Expr]:
    """Return where input k of row or column t lies in that shape."""
    return (t, k)


def sums_shape(halves: int, rows: int, columns: int) -> tuple[int, ...]:
    return (halves * rows * columns // 2, SIDE, SIDE)


def clear(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Return statements that set the sums to zero."""

    @T.macro
    def clear(sums):  # type: ignore[no-untyped-def]
        for i in T.unroll(halves * rows * columns // 2):
            T.metal.make_filled_simdgroup_matrix(
                sums.data, index=i, value=T.float32(0), col=SIDE, row=SIDE
            )

    return clear  # type: ignore[no-any-return]


def multiply(halves: int, rows: int, columns: int) -> Callable[..., object]:
    """Return statements that add the products of a block: `x` holds the tile's rows, `weight` its
    columns, with both halves side by side."""
    wide = columns // 2  # matrices

    def pointer(block: Buffer, t: Expr, k: Expr) -> Expr:
        return block.access_ptr("r", offset=t * STRIDE + k * SIDE)

    def first_column(thread: Expr, h: Expr) -> Expr:
        return (h * GROUPS + thread // SIMD_GROUP % GROUPS) * wide * SIDE

    @T.macro
    def multiply(sums, x, weight, thread):  # type: ignore[no-untyped-def]
        a = T.alloc_buffer((rows, SIDE, SIDE), "float32", scope=SCOPE)
        b = T.alloc_buffer((halves * wide, SIDE, SIDE), "float32", scope=SCOPE)
        for k in range(T.int64(BLOCK // SIDE)):
            for m in T.unroll(rows):
                T.metal.simdgroup_load(
                    a.data,
                    index=m,
                    ptr=pointer(x, first_row(thread, rows) + m * SIDE, k),
                    stride=STRIDE,
                    col=SIDE,
                    row=SIDE,
                )
            for h in T.unroll(halves):
                for n in T.unroll(wide):
                    T.metal.simdgroup_load(
                        b.data,
                        index=h * wide + n,
                        ptr=pointer(weight, first_column(thread, h) + n * SIDE, k),
                        stride=STRIDE,
                        col=SIDE,
                        row=SIDE,
                        transpose_matrix=True,
                    )
            for h in T.unroll(halves):
                for m in T.unroll(rows):
                    for n in T.unroll(wide):
                        T.metal.simdgroup_multiply_accumulate(
                            sums.data,
                            (h * rows + m) * wide + n,
                            a.data,
                            m,
                            b.data,
                            h * wide + n,
                            sums.data,
                            (h * rows + m) * wide + n,
                        )

    return multiply  # type: ignore[no-any-return]


def keep_each(
    halves: int, rows: int, columns: int, keep: Callable[..., object]
) -> Callable[..., object]:
    """Return statements that call `keep` (at, row, num_columns, column_of(c), sum_of(half, c)) for
    every sum; rows and columns are the tile's, and `at` is passed through."""
    wide = columns // 2

    def offset(thread: Expr, h: Expr) -> Expr:
        return (thread // SIMD_GROUP * halves + h) * SIDE * SIDE

    def column(thread: Expr, n: Expr, c: Expr) -> Expr:
        return (thread // SIMD_GROUP % GROUPS * wide + n) * SIDE + thread % 4 * 2 + c

    @T.macro
    def keep_each(sums, thread, at):  # type: ignore[no-untyped-def]
        shown = T.alloc_buffer((GROUPS * GROUPS, halves, SIDE, SIDE), "float32", scope="shared")
        for m in T.unroll(rows):
            for n in T.unroll(wide):
                for h in T.unroll(halves):
                    T.metal.simdgroup_store(
                        sums.data,
                        index=(h * rows + m) * wide + n,
                        ptr=shown.access_ptr("w", offset=offset(thread, h)),
                        stride=SIDE,
                        col=SIDE,
                        row=SIDE,
                    )
                keep(
                    at,
                    first_row(thread, rows) + m * SIDE + thread % SIMD_GROUP // 4,
                    2,
                    lambda c: column(thread, n, c),
                    lambda half, c: shown[
                        thread // SIMD_GROUP,
                        half,
                        thread % SIMD_GROUP // 4,
                        thread % 4 * 2 + c,
                    ],
                )

    return keep_each  # type: ignore[no-any-return]


def first_row(thread: Expr, rows: int) -> Expr:
    """Return the first row of the tile that the thread's SIMD-group computes."""
    return thread // (GROUPS * SIMD_GROUP) * rows * SIDE
