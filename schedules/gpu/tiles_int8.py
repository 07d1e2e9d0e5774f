"""Matrix products of many rows of quantised activations, on GPUs with a product of bytes: a
work-group computes a tile of rows x columns.

It goes through the inputs some blocks of 32 at a time: weights, as bytes, and activations are put
into shared memory, and the threads add up each block's products as whole numbers, and then, scaled,
in their registers. Rows of several experts in a tile are taken one expert after the other.

How a work-group multiplies and which sums a thread holds is up to the instruction (`dot4.py`,
`mma.py`).
"""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import IntImm, PrimFunc, Stmt

from ...targets import Target
from ..formats import (
    DIGIT,
    fp4_bytes_offset_by_12,
    half_e8m0_to_float32,
)
from ..product import OPS, Product, whole_parts
from ..records import Choose
from . import dot4, mma
from .row_tiles import RowTiles
from .shared import WORDS, place
from .tail import with_tail

INSTRUCTIONS = {"dot4": dot4, "mma": mma}  # by what `Target.int8_dot` calls them
DEPTHS = (1, 2, 3, 4)  # blocks at a time


def tiles_int8(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` of a symbolic number of rows of quantised activations; declines others,
    columns that do not fill tiles, and targets without a product of bytes."""
    if str(function.attrs["op"]) not in OPS or target.int8_dot not in INSTRUCTIONS:
        return None
    product = Product(function)
    width = INSTRUCTIONS[target.int8_dot].TILE_COLUMNS
    fits = product.columns % (width * min(INSTRUCTIONS[target.int8_dot].COLUMNS_EACH)) == 0
    if isinstance(product.num_rows, IntImm) or "xq" not in product.tensors or not fits:
        return None
    return with_tail(function, _body(product, target, choose), target, choose)


def _body(product: Product, target: Target, choose: Choose) -> Stmt:
    assert target.int8_dot is not None
    instruction = INSTRUCTIONS[target.int8_dot]
    xs, xoffset, words, scales, out = (
        product.tensors[n] for n in ("xs", "xoffset", "words", "scales", "out")
    )
    halves, threads = product.halves, instruction.THREADS
    fp4, digits = product.expert is not None, product.digits
    rows = choose("rows_each", instruction.ROWS_EACH, 4)
    columns = choose(
        "columns_each",
        *whole_parts(
            product.columns // instruction.TILE_COLUMNS,
            instruction.COLUMNS_EACH,
            instruction.COLUMNS_WANTED // halves,
        ),
    )
    depth = choose("blocks_together", *whole_parts(product.blocks, DEPTHS, 2))
    tile_rows, tile_columns = rows * instruction.TILE_ROWS, columns * instruction.TILE_COLUMNS
    weight_rows = halves * tile_columns
    tiles = RowTiles(product, tile_rows)
    multiply = instruction.multiply(halves, rows, columns)
    row_at, column_at = instruction.row, instruction.column

    def weight_at(tile: Expr, first: Expr, group: Expr, r: Expr, block: Expr) -> tuple[Expr, ...]:
        """The first indices of a block of row r of the weights of a tile."""
        expert = product.expert_of(tiles.row(tile, first))
        column = group * tile_columns + r % tile_columns
        return product.weight_at(expert, r // tile_columns, column, block)

    def weight_bytes(at: tuple[Expr, ...], word: Expr) -> Expr:
        if fp4:
            return fp4_bytes_offset_by_12(words[(*at, word // 2)], word % 2)
        return words[(*at, word)]

    def weight_scale(at: tuple[Expr, ...]) -> Expr:
        return half_e8m0_to_float32(scales[at]) if fp4 else scales[at].astype("float32")

    def offset(row: Expr, block: Expr) -> Expr:
        return xoffset[row, block] if fp4 else T.int32(0)

    num_weights, num_activations = depth * weight_rows, depth * digits * tile_rows

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for tile in T.thread_binding(tiles.count(), thread="blockIdx.y"):
            for group in T.thread_binding(
                T.int64(product.columns // tile_columns), thread="blockIdx.x"
            ):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    weight = T.alloc_buffer((depth, weight_rows, WORDS), "uint32", scope="shared")
                    scale = T.alloc_buffer((depth, weight_rows), "float32", scope="shared")
                    x = T.alloc_buffer((depth, digits, tile_rows, WORDS), "uint32", scope="shared")
                    x_scale = T.alloc_buffer((depth, tile_rows), "float32", scope="shared")
                    x_offset = T.alloc_buffer((depth, tile_rows), "int32", scope="shared")
                    total = T.alloc_buffer((halves, rows, columns), "int32", scope="local")
                    acc = T.alloc_buffer((halves, rows, columns), "float32", scope="local")
                    for first in range(T.int64(tile_rows)):
                        for h, r, c in T.grid(halves, rows, columns):
                            acc[h, r, c] = T.float32(0)
                        for step in range(
                            T.if_then_else(
                                tiles.begins(tile, first),
                                T.int64(product.blocks // depth),
                                T.int64(0),
                            )
                        ):
                            for i in range(T.int64(-(-num_weights * WORDS // threads))):
                                if i * threads + thread < num_weights * WORDS:
                                    weight[
                                        (i * threads + thread) // WORDS // weight_rows,
                                        (i * threads + thread) // WORDS % weight_rows,
                                        place(
                                            (i * threads + thread) // WORDS,
                                            (i * threads + thread) % WORDS,
                                        ),
                                    ] = weight_bytes(
                                        weight_at(
                                            tile,
                                            first,
                                            group,
                                            (i * threads + thread) // WORDS % weight_rows,
                                            step * depth
                                            + (i * threads + thread) // WORDS // weight_rows,
                                        ),
                                        (i * threads + thread) % WORDS,
                                    )
                            for i in range(T.int64(-(-num_weights // threads))):
                                if i * threads + thread < num_weights:
                                    scale[
                                        (i * threads + thread) // weight_rows,
                                        (i * threads + thread) % weight_rows,
                                    ] = weight_scale(
                                        weight_at(
                                            tile,
                                            first,
                                            group,
                                            (i * threads + thread) % weight_rows,
                                            step * depth + (i * threads + thread) // weight_rows,
                                        )
                                    )
                            for i in range(T.int64(-(-num_activations * WORDS // threads))):
                                if i * threads + thread < num_activations * WORDS:
                                    x[
                                        (i * threads + thread) // WORDS // tile_rows // digits,
                                        (i * threads + thread) // WORDS // tile_rows % digits,
                                        (i * threads + thread) // WORDS % tile_rows,
                                        place(
                                            (i * threads + thread) // WORDS,
                                            (i * threads + thread) % WORDS,
                                        ),
                                    ] = product.four_activations(
                                        tiles.row(
                                            tile, (i * threads + thread) // WORDS % tile_rows
                                        ),
                                        step * depth
                                        + (i * threads + thread) // WORDS // tile_rows // digits,
                                        (i * threads + thread) % WORDS * 4,
                                        (i * threads + thread) // WORDS // tile_rows % digits,
                                    )
                            for i in range(T.int64(-(-depth * tile_rows // threads))):
                                if i * threads + thread < depth * tile_rows:
                                    x_scale[
                                        (i * threads + thread) // tile_rows,
                                        (i * threads + thread) % tile_rows,
                                    ] = xs[
                                        tiles.row(tile, (i * threads + thread) % tile_rows),
                                        step * depth + (i * threads + thread) // tile_rows,
                                    ]
                                    x_offset[
                                        (i * threads + thread) // tile_rows,
                                        (i * threads + thread) % tile_rows,
                                    ] = offset(
                                        tiles.row(tile, (i * threads + thread) % tile_rows),
                                        step * depth + (i * threads + thread) // tile_rows,
                                    )
                            for b in range(T.int64(depth)):
                                for h in T.unroll(halves):
                                    for r in T.unroll(rows):
                                        for c in T.unroll(columns):
                                            total[h, r, c] = 0
                                for digit in T.unroll(digits):
                                    for h in T.unroll(halves):
                                        for r in T.unroll(rows):
                                            for c in T.unroll(columns):
                                                total[h, r, c] = total[h, r, c] * DIGIT
                                    multiply(total, x, weight, thread, b, digit)
                                for h in T.unroll(halves):
                                    for r in T.unroll(rows):
                                        for c in T.unroll(columns):
                                            acc[h, r, c] += (
                                                T.Cast(
                                                    "float32",
                                                    total[h, r, c]
                                                    - x_offset[b, row_at(thread, r, rows)],
                                                )
                                                * scale[
                                                    b,
                                                    h * tile_columns
                                                    + column_at(thread, c, columns),
                                                ]
                                                * x_scale[b, row_at(thread, r, rows)]
                                            )
                        if tiles.begins(tile, first):
                            for r in T.unroll(rows):
                                if tiles.belongs(tile, row_at(thread, r, rows), first):
                                    for c in T.unroll(columns):
                                        out[
                                            tile * tile_rows + row_at(thread, r, rows),
                                            group * tile_columns + column_at(thread, c, columns),
                                        ] = product.output(
                                            tile * tile_rows + row_at(thread, r, rows),
                                            group * tile_columns + column_at(thread, c, columns),
                                            lambda half: acc[half, r, c],
                                        )

    return body.body
