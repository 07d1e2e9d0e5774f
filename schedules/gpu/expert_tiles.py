"""Tiles of rows that share weights, for kernels that take a tile by its number.

Rows are sorted by expert. Expert e, whose rows are [first, end), has the tiles from first // size +
e on: that many experts before it can have left a tile half empty. A tile that this leaves out is
empty.
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, Stmt

from ..product import Product

THREADS = 1024  # that list tiles
TOGETHER = 8  # rows whose experts a thread loads at once


def tile_list(product: Product, experts: int, size: int) -> Buffer:
    """Return the list that `list_tiles` fills: of each tile the first row, and the row after the
    last, int32."""
    count = tirx.floordiv(product.num_rows, tirx.const(size, "int64")) + experts
    return tirx.decl_buffer((count, tirx.const(2, "int64")), "int32", "expert_tiles")


def list_tiles(product: Product, tiles: Buffer, experts: int, size: int, used: Expr) -> Stmt:
    """Return a launch that lists the tiles of all experts; none where `used` is 0. Its threads look
    for rows of another expert than that of the row before; then a thread has an expert."""
    row_expert, num_rows = product.expert, product.num_rows
    assert row_expert is not None and experts < THREADS

    def expert_of(row: Expr) -> Expr:
        """Return a row's expert, or -1 for the row before the first."""
        at = T.max(T.min(row, num_rows - 1), T.int64(0))
        return T.Select(row < 0, T.int32(-1), row_expert[at])

    def bound_of(bounds: Buffer, tile: Expr) -> Expr:
        """Return where the tile before `tile` ends, counted from the expert's first."""
        return T.min(bounds[0] + T.Cast("int32", tile * size), bounds[1])

    @T.macro
    def load(found, row):  # type: ignore[no-untyped-def]
        for i in T.unroll(TOGETHER):
            for side in T.unroll(2):
                found[i * 2 + side] = expert_of(row + i * THREADS + side - 1)

    @T.macro
    def keep(firsts, found, row):  # type: ignore[no-untyped-def]
        for i in T.unroll(TOGETHER):
            if row + i * THREADS < num_rows:
                while found[i * 2] < found[i * 2 + 1]:
                    found[i * 2] += 1
                    firsts[found[i * 2]] = T.Cast("int32", row + i * THREADS)

    @T.macro
    def list_of(bounds, expert):  # type: ignore[no-untyped-def]
        for tile in range(bounds[1] // size + 1 - bounds[0] // size):
            for side in T.unroll(2):
                tiles[bounds[0] // size + expert + tile, side] = bound_of(bounds, tile + side)

    @T.macro
    def list_all(firsts, thread):  # type: ignore[no-untyped-def]
        found = T.alloc_buffer((TOGETHER * 2,), "int32", scope="local")
        bounds = T.alloc_buffer((2,), "int32", scope="local")
        if thread <= experts:
            firsts[thread] = T.Cast("int32", num_rows)
        T.tvm_storage_sync("shared")
        for turn in range(tirx.ceildiv(num_rows, T.int64(THREADS * TOGETHER))):
            load(found, turn * (THREADS * TOGETHER) + thread)
            keep(firsts, found, turn * (THREADS * TOGETHER) + thread)
        for side in T.unroll(2):
            bounds[side] = firsts[T.min(thread + side, experts)]
        if thread < experts:
            list_of(bounds, thread)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for _group in T.thread_binding(used, thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(THREADS), thread="threadIdx.x"):
                firsts = T.alloc_buffer((experts + 1,), "int32", scope="shared")
                list_all(firsts, thread)

    return body.body
