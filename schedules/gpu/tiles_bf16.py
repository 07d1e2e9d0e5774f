"""Matrix products of many rows of bfloat16 activations, on GPUs whose matrix units take them: a
work-group computes a tile of columns x rows of one expert.

Each of its warpgroups has 64 rows of weights, which it turns into bfloat16 in registers. Stored
weights and activations pass through a ring of stages in shared memory, into which copies run
ahead: while the units multiply the inputs of a step, threads unpack the weights of the next.

Where a kernel has two halves (gate and up), a thread's two rows of weights are those of the same
column, so that it has both of their sums.
"""

from collections.abc import Callable
from dataclasses import replace

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..formats import is_few
from ..product import Product
from ..records import Choose
from ..tail import rooted
from .bf16_results import write
from .bf16_steps import multiply
from .bf16_tile import Tile
from .expert_tiles import list_tiles, tile_list
from .few_bf16 import are_few, few_bf16
from .tail import with_tail

OPS = ("dense_int8_bf16", "moe_mxfp4_swiglu_bf16", "moe_mxfp4_sum_bf16")
WARPGROUPS = (1, 2, 4)
ROWS = (64, 128)  # of activations in a tile
STAGES = (3, 4, 6, 8)
# Threads that run together have 128 registers each, which is what a thread needs; while one
# work-group begins or writes, another multiplies.
THREADS_AT_ONCE = 512
AT_ONCE = "tirx.launch_bounds_min_blocks_per_sm"


def tiles_bf16(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` for a symbolic number of rows; declines others."""
    if str(function.attrs["op"]) not in OPS or target.bf16_matrix != "wgmma":
        return None
    product = Product(function)
    few = few_bf16(product, target, choose)
    if few is not None and is_few(product.num_rows):
        launches, between = few
    else:
        used = T.int64(1) if few is None else 1 - are_few(product)
        launches, between = _launches(product, target, choose, used)
        if few is not None:  # whose launches have no groups where these have some
            launches, between = few[0] + launches, few[1] + between
    body = rooted(launches, between)
    if product.halves == 2:  # which writes panels itself
        return Schedule(function.with_body(body))
    return with_tail(function, body, target, choose)


def _launches(
    product: Product, target: Target, choose: Choose, used: Expr
) -> tuple[list[Stmt], list[Buffer]]:
    """Return launches, without groups where `used` is 0, and memory between them."""
    warpgroups = choose("warpgroups", WARPGROUPS, 2)
    rows = choose("rows_together", ROWS, 128)
    tile = Tile(product, warpgroups, rows, 1)
    fitting = [n for n in STAGES if n * tile.stage_words * 4 <= target.shared_bytes]
    tile = replace(tile, stages=choose("stages", fitting, 4))
    if product.expert is None:
        return [_body(tile, None, used)], []
    experts = int(product.tensors["words"].shape[0])
    listed = tile_list(product, experts, rows)
    return [list_tiles(product, listed, experts, rows, used), _body(tile, listed, used)], [listed]


def _body(tile: Tile, listed: Buffer | None, used: Expr) -> Stmt:
    product, rows, threads = tile.product, tile.rows, tile.threads
    count = (product.num_rows + (rows - 1)) // rows if listed is None else listed.shape[0]
    compute = _compute(tile)

    def bound(number: Expr, side: int) -> Expr:
        if listed is not None:
            return listed[number, side].astype("int64")
        return T.min((number + side) * rows, product.num_rows)

    @T.macro
    def compute_tile(shared, number, group, thread):  # type: ignore[no-untyped-def]
        bounds = T.alloc_buffer((2,), "int64", scope="local")
        bounds[0] = bound(number, 0)
        bounds[1] = bound(number, 1)
        if bounds[0] < bounds[1]:
            compute(shared, bounds[0], bounds[1], group, thread)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for number in T.thread_binding(count * used, thread="blockIdx.y"):
            for group in T.thread_binding(T.int64(tile.groups), thread="blockIdx.x"):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    shared = T.alloc_buffer(
                        (tile.stages * tile.stage_words,), "uint32", scope="shared.dyn"
                    )
                    with T.attr(T.int32(0), AT_ONCE, T.int32(THREADS_AT_ONCE // threads)):
                        compute_tile(shared, number, group, thread)

    return body.body


def _compute(tile: Tile) -> Callable[..., object]:
    """Return statements that compute the results of the rows [first, end). Where they are few, the
    products are of fewer."""
    add_products, write_sums = multiply(tile), write(tile)

    @T.macro
    def compute_all(shared, first, end, group, thread):  # type: ignore[no-untyped-def]
        expert = T.alloc_buffer((1,), "int64", scope="local")
        sums = T.alloc_buffer((tile.rows // 2,), "float32", scope="local")
        expert[0] = tile.product.expert_of(first)
        for i in T.unroll(tile.rows // 2):
            sums[i] = T.float32(0)
        add_products(sums, shared, first, end, expert[0], group, thread)
        write_sums(sums, first, end, expert[0], group, thread)

    fewer = [n for n in ROWS if n < tile.rows]
    if not fewer:
        return compute_all  # type: ignore[no-any-return]
    most = max(fewer)
    compute_few = _compute(replace(tile, rows=most))

    @T.macro
    def compute(shared, first, end, group, thread):  # type: ignore[no-untyped-def]
        if first + most < end:
            compute_all(shared, first, end, group, thread)
        else:
            compute_few(shared, first, end, group, thread)

    return compute  # type: ignore[no-any-return]
