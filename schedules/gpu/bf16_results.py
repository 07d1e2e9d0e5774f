"""The results of a tile's product of bfloat16, from a thread's sums.

Sums become results, in the same registers, before they are written: compilers cannot know that a
bias or a residual does not lie where results go, and would wait for each.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import PANEL, const, float32_to_bf16, panel_input
from . import wgmma
from .bf16_tile import Tile

TOGETHER = 16  # sums whose residuals are loaded at once, for which a thread has registers


def write(tile: Tile) -> Callable[..., object]:
    """Return statements that write a thread's results for the rows [first, end)."""
    return _write_panels(tile) if tile.product.halves == 2 else _write_floats(tile)


def _write_floats(tile: Tile) -> Callable[..., object]:
    product, out = tile.product, tile.product.out
    factor, last = const(tile.format.factor, "float32"), const(product.columns - 1, "int64")

    def column_of(group: Expr, thread: Expr, i: Expr) -> Expr:
        return tile.place(group, tile.row(thread, i // 2 % 2))

    def result(sums: Buffer, row: Expr, column: Expr, expert: Expr, i: Expr) -> Expr:
        return product.output(row, column, lambda half: sums[i] * factor, expert)

    @T.macro
    def finish(sums, first, end, expert, group, thread, i):  # type: ignore[no-untyped-def]
        sums[i] = result(
            sums,
            T.min(first + wgmma.token(thread, i), end - 1),
            T.min(column_of(group, thread, i), last),
            expert,
            i,
        )

    @T.macro
    def keep(value, row, end, column):  # type: ignore[no-untyped-def]
        if T.And(row < end, column < product.columns):
            out[row, column] = value

    @T.macro
    def write_sums(sums, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        for some in T.unroll(tile.rows // 2 // TOGETHER):
            for i in T.unroll(TOGETHER):
                finish(sums, first, end, expert, group, thread, some * TOGETHER + i)
            for i in T.unroll(TOGETHER):
                keep(
                    sums[some * TOGETHER + i],
                    first + wgmma.token(thread, some * TOGETHER + i),
                    end,
                    column_of(group, thread, some * TOGETHER + i),
                )

    return write_sums  # type: ignore[no-any-return]


def _write_panels(tile: Tile) -> Callable[..., object]:
    """For two halves: sums i and i + 2 are of the same row and column. The result is where the
    first was."""
    product, panels = tile.product, tile.product.tensors["xb_out"]
    factor, last = const(tile.format.factor, "float32"), const(product.columns - 1, "int64")

    def column_at(place: Expr) -> Expr:
        return place // PANEL * PANEL + panel_input(place % PANEL)

    def result(sums: Buffer, row: Expr, place: Expr, expert: Expr, i: Expr) -> Expr:
        column = T.min(column_at(place), last)
        return product.output(row, column, lambda half: sums[i + half * 2] * factor, expert)

    def bits(value: Expr, place: Expr) -> Expr:
        rounded = float32_to_bf16(value)
        return T.Select(column_at(place) < product.columns, rounded, const(0, "uint16"))

    @T.macro
    def finish(sums, first, end, expert, place, thread):  # type: ignore[no-untyped-def]
        for j in T.unroll(tile.rows // 8):
            for side in T.unroll(2):
                sums[j * 4 + side] = result(
                    sums,
                    T.min(first + wgmma.token(thread, j * 4 + side), end - 1),
                    place,
                    expert,
                    j * 4 + side,
                )

    @T.macro
    def keep(value, row, end, place):  # type: ignore[no-untyped-def]
        if T.And(row < end, place < tile.places):
            panels[row, place // PANEL, place % PANEL] = bits(value, place)

    @T.macro
    def write_sums(sums, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        finish(sums, first, end, expert, tile.place(group, tile.row(thread, 0)), thread)
        for j in T.unroll(tile.rows // 8):
            for side in T.unroll(2):
                keep(
                    sums[j * 4 + side],
                    first + wgmma.token(thread, j * 4 + side),
                    end,
                    tile.place(group, tile.row(thread, 0)),
                )

    return write_sums  # type: ignore[no-any-return]
