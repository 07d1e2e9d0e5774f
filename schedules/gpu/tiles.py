"""Matrix products of many rows of activations: a work-group computes a tile of rows x columns.

It goes through the inputs a block of 32 at a time: weights and activations are unpacked to float32
into shared memory, and every thread adds their products to some sums in its registers. Rows of
several experts in a tile are taken one expert after the other.
"""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import IntImm, PrimFunc, Stmt

from ...targets import Target
from ..formats import BLOCK
from ..product import OPS, Product, whole_parts
from ..records import Choose
from ..tail import split_tail
from .tail import with_tail

SIDE = 8  # threads of a work-group, in either direction
ROWS_EACH = (1, 2, 4, 8)  # of a thread
COLUMNS_EACH = (1, 2, 4, 8)


def tiles(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` of a symbolic number of rows of activations; declines others, and
    columns that do not fill tiles."""
    if str(function.attrs["op"]) not in OPS:
        return None
    product = Product(function)
    if isinstance(product.num_rows, IntImm) or product.columns % SIDE:
        return None
    body = function.with_body(_body(product, choose))
    return with_tail(body, split_tail(function)[1], target, choose)


def _body(product: Product, choose: Choose) -> Stmt:
    out, num_rows, halves = product.out, product.num_rows, product.halves
    rows = choose("rows_each", ROWS_EACH, 4)
    columns = choose(
        "columns_each", *whole_parts(product.columns // SIDE, COLUMNS_EACH, 4 // halves)
    )
    tile_rows, tile_columns = rows * SIDE, columns * SIDE
    threads = SIDE * SIDE

    def row_of(tile: Expr, t: Expr) -> Expr:
        """Rows beyond the last are computed as the last, and not kept."""
        return T.min(tile * tile_rows + t, num_rows - 1)

    def begins(tile: Expr, t: Expr) -> Expr:
        """Whether row t of a tile is the first there of its expert."""
        row = tile * tile_rows + t
        if product.expert is None:
            return t == 0
        before = product.expert[row_of(tile, T.max(t - 1, T.int64(0)))]
        return T.And(row < num_rows, T.Or(t == 0, product.expert[row_of(tile, t)] != before))

    def belongs(tile: Expr, t: Expr, first: Expr) -> Expr:
        """Whether row t is a row that has the expert of row `first`."""
        exists = tile * tile_rows + t < num_rows
        if product.expert is None:
            return exists
        same = product.expert[row_of(tile, t)] == product.expert[row_of(tile, first)]
        return T.And(exists, same)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for tile in T.thread_binding(
            (num_rows + (tile_rows - 1)) // tile_rows, thread="blockIdx.y"
        ):
            for group in T.thread_binding(
                T.int64(product.columns // tile_columns), thread="blockIdx.x"
            ):
                for ty in T.thread_binding(T.int64(SIDE), thread="threadIdx.y"):
                    for tx in T.thread_binding(T.int64(SIDE), thread="threadIdx.x"):
                        weight = T.alloc_buffer(
                            (BLOCK, halves * tile_columns), "float32", scope="shared"
                        )
                        x = T.alloc_buffer((BLOCK, tile_rows), "float32", scope="shared")
                        acc = T.alloc_buffer((halves, rows, columns), "float32", scope="local")
                        for first in range(T.int64(tile_rows)):
                            for h, r, c in T.grid(halves, rows, columns):
                                acc[h, r, c] = T.float32(0)
                            for block in range(
                                T.if_then_else(
                                    begins(tile, first), T.int64(product.blocks), T.int64(0)
                                )
                            ):
                                for i in range(T.int64(BLOCK * halves * tile_columns // threads)):
                                    weight[
                                        (i * threads + ty * SIDE + tx) % BLOCK,
                                        (i * threads + ty * SIDE + tx) // BLOCK,
                                    ] = product.weight(
                                        product.expert_of(row_of(tile, first)),
                                        (i * threads + ty * SIDE + tx) // BLOCK // tile_columns,
                                        group * tile_columns
                                        + (i * threads + ty * SIDE + tx) // BLOCK % tile_columns,
                                        block,
                                        (i * threads + ty * SIDE + tx) % BLOCK,
                                    )
                                for i in range(T.int64(BLOCK * tile_rows // threads)):
                                    x[
                                        (i * threads + ty * SIDE + tx) % BLOCK,
                                        (i * threads + ty * SIDE + tx) // BLOCK,
                                    ] = product.activation(
                                        row_of(tile, (i * threads + ty * SIDE + tx) // BLOCK),
                                        block,
                                        (i * threads + ty * SIDE + tx) % BLOCK,
                                    )
                                for k in range(T.int64(BLOCK)):
                                    for h in T.unroll(halves):
                                        for r in T.unroll(rows):
                                            for c in T.unroll(columns):
                                                acc[h, r, c] += (
                                                    x[k, r * SIDE + ty]
                                                    * weight[k, h * tile_columns + c * SIDE + tx]
                                                )
                            if begins(tile, first):
                                for r in T.unroll(rows):
                                    if belongs(tile, r * SIDE + ty, first):
                                        for c in T.unroll(columns):
                                            out[
                                                tile * tile_rows + r * SIDE + ty,
                                                group * tile_columns + c * SIDE + tx,
                                            ] = product.output(
                                                tile * tile_rows + r * SIDE + ty,
                                                group * tile_columns + c * SIDE + tx,
                                                lambda half: acc[half, r, c],
                                            )

    return body.body
