"""Matrix products of few rows of bfloat16 activations, whose speed memory limits, on GPUs whose
matrix units take them: a work-group computes a tile of columns x a few rows of one expert.

Its warps divide the inputs: each holds its panels of the activations in registers. Stored weights
stream through shared memory, 16 rows after the other, into which copies run far ahead; every warp
turns its part of them into bfloat16 and multiplies, and threads add up what the warps computed of
the rows before.
"""

from collections.abc import Callable
from dataclasses import replace

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, Stmt

from ...targets import Target
from ..formats import is_few
from ..product import Product
from ..records import Choose
from . import wgmma
from .expert_tiles import list_tiles, tile_list
from .few_results import MOST_READ, Of, finish_strip, keep_sums, read_early
from .few_steps import PRODUCTS, Lane, Stored, copy_strip, load_activations, multiply_strip
from .few_tile import FewTile
from .launch_before import wait_call
from .mma_bf16 import TOKENS, WARP

ROWS = (8, 16)  # of activations in a tile
STAGES = (2, 3, 4, 6, 8)
BYTES_AHEAD = 100_000  # of weights on their way to a work-group, about
STRIPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # of a work-group
PARTS = 132  # work-groups that run together
PARTS_OF_EXPERT = 24
# With more rows of activations, on average of an expert, tiles of many multiply sooner.
MOST_ROWS = 128
MOST_ROWS_OF_EXPERT = 16


def are_few(product: Product) -> Expr:
    """Return 1 if a product has so few rows of activations that memory limits its speed, else 0."""
    most = MOST_ROWS
    if product.expert is not None:
        most = MOST_ROWS_OF_EXPERT * int(product.tensors["words"].shape[0])
    return 1 - T.min((product.num_rows - 1) // most, T.int64(1))


def few_bf16(
    product: Product, target: Target, choose: Choose
) -> tuple[list[Stmt], list[Buffer]] | None:
    """Return launches, without groups where `are_few` is 0, and memory between them; None for
    shapes that do not fit."""
    tile = FewTile(product, max(ROWS), min(STAGES))
    if not tile.fits or tile.shared_bytes > target.shared_bytes:
        return None
    tile = replace(tile, rows=choose("few_rows", ROWS, 16))
    stages = [n for n in STAGES if replace(tile, stages=n).shared_bytes <= target.shared_bytes]
    ahead = [n for n in stages if (n - 1) * tile.stage_words * 4 <= BYTES_AHEAD]
    tile = replace(tile, stages=choose("few_stages", stages, max(ahead, default=stages[0])))
    used = T.int64(1) if is_few(product.num_rows) else are_few(product)
    wanted = PARTS if product.expert is None else PARTS_OF_EXPERT
    enough = (n for n in STRIPS if -(-tile.strips // n) <= wanted)
    each = choose("few_strips", STRIPS, next(enough, max(STRIPS)))
    if product.expert is None:
        return [_body(tile, None, each, used, target)], []
    experts = int(product.tensors["words"].shape[0])
    listed = tile_list(product, experts, tile.rows)
    launches = [
        list_tiles(product, listed, experts, tile.rows, used),
        _body(tile, listed, each, used, target),
    ]
    return launches, [listed]


def _body(
    tile: FewTile, listed: Buffer | None, strips_each: int, used: Expr, target: Target
) -> Stmt:
    product, threads = tile.product, tile.threads
    words, scales, xb = (product.tensors[n] for n in ("words", "scales", "xb"))
    each = T.int64(strips_each)
    if listed is None:  # all work-groups run together, however many the tiles are
        count = (product.num_rows + (tile.rows - 1)) // tile.rows
        each = each * count
    else:
        count = listed.shape[0]
    compute = _compute(tile, each, target)

    def size(tensor: Buffer) -> Expr:
        total = T.int64(1)
        for extent in tensor.shape:
            total = total * extent
        return total

    def bound(number: Expr, side: int) -> Expr:
        if listed is not None:
            return listed[number, side].astype("int64")
        return T.min((number + side) * tile.rows, product.num_rows)

    @T.macro
    def compute_tile(shared, left, stored, xs, number, part, thread):  # type: ignore[no-untyped-def]
        bounds = T.alloc_buffer((3,), "int64", scope="local")
        if target.has_dependent_launch and listed is not None:
            T.evaluate(wait_call())
        bounds[0] = bound(number, 0)
        bounds[1] = bound(number, 1)
        if bounds[0] < bounds[1]:
            bounds[2] = product.expert_of(bounds[0])
            compute(shared, left, stored, xs, Of(bounds[0], bounds[1], bounds[2]), part, thread)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        stored_words = T.decl_buffer((size(words),), "uint32", data=words.data)
        stored_scales = T.decl_buffer((size(scales),), scales.dtype, data=scales.data)
        xs = T.decl_buffer((size(xb) // 2,), "uint32", data=xb.data)
        # tiles that share weights are neighbours
        for number in T.thread_binding(count * used, thread="blockIdx.x"):
            for part in T.thread_binding((tile.strips + each - 1) // each, thread="blockIdx.y"):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    shared = T.alloc_buffer(
                        (tile.stages * tile.stage_words,), "uint32", scope="shared.dyn"
                    )
                    left = T.alloc_buffer(
                        (2, tile.warps, tile.num_sums, WARP), "float32", scope="shared"
                    )
                    compute_tile(
                        shared,
                        left,
                        Stored(stored_words, stored_scales),
                        xs,
                        number,
                        part,
                        thread,
                    )

    return body.body


def _compute(tile: FewTile, each: Expr, target: Target) -> Callable[..., object]:
    """Return statements that compute the results of some rows of an expert in the `each` strips of
    a work-group."""
    copy, load, multiply = copy_strip(tile), load_activations(tile), multiply_strip(tile)
    keep, read, finish = keep_sums(tile), read_early(tile), finish_strip(tile)
    ahead = tile.stages - 1
    # weights that depend on no launch before are on their way when it ends
    waits = target.has_dependent_launch and tile.product.expert is None

    def strips_of(part: Expr) -> Expr:
        return T.min(each, tile.strips - part * each)

    @T.macro
    def copy_next(shared, stored, of, part, s, thread):  # type: ignore[no-untyped-def]
        if s < strips_of(part):
            copy(shared, stored, of.expert, part * each + s, tile.stage(s), thread)
        T.evaluate(T.call_extern("void", wgmma.COPY_COMMIT))

    @T.macro
    def compute_strip(sums, early, x, shared, left, of, part, s, at, thread):  # type: ignore[no-untyped-def]
        read(early, of, part * each + s, thread)
        multiply(sums, x, shared, tile.stage(s), at)
        keep(left, sums, s, at)

    @T.macro
    def compute_at(shared, left, stored, xs, of, part, at, thread):  # type: ignore[no-untyped-def]
        x = T.alloc_buffer(
            (tile.panels_each, tile.rows // TOKENS, PRODUCTS * 2), "uint32", scope="local"
        )
        sums = T.alloc_buffer((tile.num_sums,), "float32", scope="local")
        early = T.alloc_buffer((MOST_READ,), "float32", scope="local")
        for s in T.unroll(T.int64(ahead)):
            copy_next(shared, stored, of, part, s, thread)
        if waits:
            T.evaluate(wait_call())
        load(x, xs, of.first, of.end, at)
        for s in range(strips_of(part) + 1):
            T.evaluate(T.call_extern("void", f"{wgmma.COPY_WAIT}<{ahead - 1}>"))
            T.tvm_storage_sync("shared")  # from here, strip s is there and s - 1 is multiplied
            copy_next(shared, stored, of, part, s + ahead, thread)
            if s > 0:
                finish(left, early, of, s - 1, part * each + s - 1, thread)
            if s < strips_of(part):
                compute_strip(sums, early, x, shared, left, of, part, s, at, thread)

    @T.macro
    def compute(shared, left, stored, xs, of, part, thread):  # type: ignore[no-untyped-def]
        compute_at(shared, left, stored, xs, of, part, Lane(thread // WARP, thread % WARP), thread)

    return compute  # type: ignore[no-any-return]
