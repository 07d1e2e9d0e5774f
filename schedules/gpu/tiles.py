"""Matrix products of many rows of activations: a work-group computes a tile of rows x columns.

It goes through the inputs a block of 32 at a time: it unpacks weights and activations to float32
into shared memory, and the threads add up their products. If a tile has rows of several experts, it
takes one expert after the other.

The instruction (`fma.py`, `simdgroup.py`, `tf32.py`) decides how a work-group multiplies and which
sums a thread holds.
"""

from types import ModuleType

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Stmt

from ...targets import Target
from ..formats import BLOCK, is_few
from ..product import OPS, Product, whole_parts
from ..records import Choose
from . import fma, simdgroup, tf32
from .row_tiles import RowTiles
from .tail import with_tail

INSTRUCTIONS = {"simdgroup": simdgroup, "tf32": tf32}  # named as in `Target.matrix`


def tiles(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` with a symbolic number of rows of activations; declines others, and
    columns that do not fill tiles."""
    if str(function.attrs["op"]) not in OPS:
        return None
    product = Product(function)
    instruction = _instruction(product, target)
    if is_few(product.num_rows) or instruction is None:
        return None
    return with_tail(function, _body(product, instruction, choose), target, choose)


def _instruction(product: Product, target: Target) -> ModuleType | None:
    """Return the target's best instruction that takes the weights and whose tiles columns fill."""
    of_target = [INSTRUCTIONS[target.matrix]] if target.matrix is not None else []
    for instruction in (*of_target, fma):
        fills = product.columns % (instruction.TILE_COLUMNS * min(instruction.COLUMNS_EACH)) == 0
        if fills and (instruction.ANY_WEIGHT or "weight" in product.tensors):
            return instruction
    return None


def _body(product: Product, instruction: ModuleType, choose: Choose) -> Stmt:
    out, halves, threads = product.out, product.halves, instruction.THREADS
    rows = choose("rows_each", instruction.ROWS_EACH, instruction.ROWS_WANTED)
    columns = choose(
        "columns_each",
        *whole_parts(
            product.columns // instruction.TILE_COLUMNS,
            instruction.COLUMNS_EACH,
            instruction.COLUMNS_WANTED // halves,
        ),
    )
    tile_rows, tile_columns = rows * instruction.TILE_ROWS, columns * instruction.TILE_COLUMNS
    row_tiles, place = RowTiles(product, tile_rows), instruction.place
    each = (halves, rows, columns)
    clear, multiply = instruction.clear(*each), instruction.multiply(*each)
    shape, sums_shape, scope = instruction.shape, instruction.sums_shape(*each), instruction.SCOPE

    # `at` is the tile, the group of columns, and the tile's first row of the expert
    @T.macro
    def keep(at, row, num_columns, column_of, sum_of):  # type: ignore[no-untyped-def]
        if row_tiles.belongs(at[0], row, at[2]):
            for c in T.unroll(num_columns):
                out[at[0] * tile_rows + row, at[1] * tile_columns + column_of(c)] = product.output(
                    at[0] * tile_rows + row,
                    at[1] * tile_columns + column_of(c),
                    lambda half: sum_of(half, c),
                )

    keep_each = instruction.keep_each(*each, keep)

    def weight_of(tile: Expr, first: Expr, group: Expr, block: Expr, i: Expr) -> Expr:
        """Return the i-th weight in a block of the tile's columns, counted over both halves."""
        column = i // BLOCK
        return product.weight(
            product.expert_of(row_tiles.row(tile, first)),
            column // tile_columns,
            group * tile_columns + column % tile_columns,
            block,
            i % BLOCK,
        )

    @T.macro
    def load_weights(weight, tile, first, group, block, thread):  # type: ignore[no-untyped-def]
        for i in range(T.int64(BLOCK * halves * tile_columns // threads)):
            weight[place((i * threads + thread) % BLOCK, (i * threads + thread) // BLOCK)] = (
                weight_of(tile, first, group, block, i * threads + thread)
            )

    @T.macro
    def load_activations(x, tile, block, thread):  # type: ignore[no-untyped-def]
        for i in range(T.int64(BLOCK * tile_rows // threads)):
            x[place((i * threads + thread) % BLOCK, (i * threads + thread) // BLOCK)] = (
                product.activation(
                    row_tiles.row(tile, (i * threads + thread) // BLOCK),
                    block,
                    (i * threads + thread) % BLOCK,
                )
            )

    @T.macro
    def compute(tile, group, thread):  # type: ignore[no-untyped-def]
        weight = T.alloc_buffer(shape(halves * tile_columns), "float32", scope="shared")
        x = T.alloc_buffer(shape(tile_rows), "float32", scope="shared")
        sums = T.alloc_buffer(sums_shape, "float32", scope=scope)
        for first in range(T.int64(tile_rows)):
            # a loop, because TVM lets no threads wait for each other within a condition
            for _ in range(T.if_then_else(row_tiles.begins(tile, first), T.int64(1), T.int64(0))):
                clear(sums)
                for block in range(T.int64(product.blocks)):
                    load_weights(weight, tile, first, group, block, thread)
                    load_activations(x, tile, block, thread)
                    multiply(sums, x, weight, thread)
                keep_each(sums, thread, (tile, group, first))

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for tile in T.thread_binding(row_tiles.count(), thread="blockIdx.y"):
            for group in T.thread_binding(
                T.int64(product.columns // tile_columns), thread="blockIdx.x"
            ):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    compute(tile, group, thread)

    return body.body
