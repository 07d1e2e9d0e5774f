"""The results of a tile's product of bfloat16, from a thread's sums."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import PANEL, const, float32_to_bf16, panel_input
from . import wgmma
from .bf16_tile import Tile


def write(tile: Tile) -> Callable[..., object]:
    """Return statements that write a thread's results for the rows [first, end)."""
    return _write_panels(tile) if tile.product.halves == 2 else _write_floats(tile)


def _write_floats(tile: Tile) -> Callable[..., object]:
    product, out = tile.product, tile.product.out
    factor = const(tile.format.factor, "float32")

    def result(sums: Buffer, row: Expr, column: Expr, expert: Expr, i: Expr) -> Expr:
        return product.output(row, column, lambda half: sums[i] * factor, expert)

    @T.macro
    def keep(sums, row, end, column, expert, i):  # type: ignore[no-untyped-def]
        if T.And(row < end, column < product.columns):
            out[row, column] = result(sums, row, column, expert, i)

    @T.macro
    def write_sums(sums, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        for i in T.unroll(tile.rows // 2):
            keep(
                sums,
                first + wgmma.token(thread, i),
                end,
                tile.place(group, tile.row(thread, i // 2 % 2)),
                expert,
                i,
            )

    return write_sums  # type: ignore[no-any-return]


def _write_panels(tile: Tile) -> Callable[..., object]:
    """For two halves: sums i and i + 2 are of the same row and column."""
    product, panels = tile.product, tile.product.tensors["xb_out"]
    factor = const(tile.format.factor, "float32")

    def result(sums: Buffer, row: Expr, place: Expr, expert: Expr, i: Expr) -> Expr:
        column = place // PANEL * PANEL + panel_input(place % PANEL)
        at = T.min(column, const(product.columns - 1, "int64"))
        value = product.output(row, at, lambda half: sums[i + half * 2] * factor, expert)
        bits = float32_to_bf16(value)
        return T.Select(column < product.columns, bits, const(0, "uint16"))

    @T.macro
    def keep(sums, row, end, place, expert, i):  # type: ignore[no-untyped-def]
        if T.And(row < end, place < tile.places):
            panels[row, place // PANEL, place % PANEL] = result(sums, row, place, expert, i)

    @T.macro
    def write_sums(sums, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        for j in T.unroll(tile.rows // 8):
            for side in T.unroll(2):
                keep(
                    sums,
                    first + wgmma.token(thread, j * 4 + side),
                    end,
                    tile.place(group, tile.row(thread, 0)),
                    expert,
                    j * 4 + side,
                )

    return write_sums  # type: ignore[no-any-return]
