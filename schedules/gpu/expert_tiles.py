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


def tile_list(product: Product, experts: int, size: int) -> Buffer:
    """Return the list that `list_tiles` fills: of each tile the first row, and the row after the
    last, int32."""
    count = tirx.floordiv(product.num_rows, tirx.const(size, "int64")) + experts
    return tirx.decl_buffer((count, tirx.const(2, "int64")), "int32", "expert_tiles")


def list_tiles(product: Product, tiles: Buffer, experts: int, size: int, used: Expr) -> Stmt:
    """Return a launch in which a thread lists the tiles of an expert; none where `used` is 0."""
    row_expert, num_rows = product.expert, product.num_rows
    assert row_expert is not None

    @T.macro
    def search(found, last, expert):  # type: ignore[no-untyped-def]
        """Set found[0] to the first row of an expert from `expert` on."""
        found[0] = T.int64(0)
        last[0] = num_rows
        while found[0] < last[0]:
            if row_expert[(found[0] + last[0]) // 2] < T.Cast("int32", expert):
                found[0] = (found[0] + last[0]) // 2 + 1
            else:
                last[0] = (found[0] + last[0]) // 2

    def bound_of(first: Expr, end: Expr, tile: Expr) -> Expr:
        """Return where the tile before `tile` ends, counted from the expert's first."""
        return T.Cast("int32", T.min(first + tile * size, end))

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for _group in T.thread_binding(used, thread="blockIdx.x"):
            for expert in T.thread_binding(T.int64(experts), thread="threadIdx.x"):
                first = T.alloc_buffer((1,), "int64", scope="local")
                end = T.alloc_buffer((1,), "int64", scope="local")
                last = T.alloc_buffer((1,), "int64", scope="local")
                search(first, last, expert)
                search(end, last, expert + 1)
                for tile in range(end[0] // size + 1 - first[0] // size):
                    for side in T.unroll(2):
                        tiles[first[0] // size + expert + tile, side] = bound_of(
                            first[0], end[0], tile + side
                        )

    return body.body
