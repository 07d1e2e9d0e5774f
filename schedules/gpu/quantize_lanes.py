"""Quantise blocks of 32 numbers that the threads of a subgroup hold, one each."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import const
from ..stages import Load, Stages
from .lanes import add_lanes, find_greatest


def quantize_lanes(
    stages: Stages, source: str, results: tuple[Buffer, Buffer, Buffer]
) -> Callable[..., object]:
    """Return a macro (value, row, block, thread, kept, largest, scales, whole) that quantises the
    threads' values of `source`, the stage or parameter which the last stages of a kernel quantise,
    into `results`, xq, xs and xoffset (`osscompile/kernels/quantize.py`).

    A thread has the last four [1] for itself: float32, uint32, float32, int32.
    """
    xq, xs, xoffset = results

    def of(buffer: Buffer) -> Load:
        return lambda indices: buffer[0]

    def magnitude(value: Expr) -> Expr:
        return T.reinterpret("uint32", value) & const(0x7FFFFFFF, "uint32")

    def scale(row: Expr, block: Expr, largest: Buffer) -> Expr:
        return stages.value(xs.name, (row, block), {"largest": of(largest)})

    def whole_number(row: Expr, block: Expr, thread: Expr, kept: Buffer, scales: Buffer) -> Expr:
        loads = {source: of(kept), xs.name: of(scales)}
        return stages.value(xq.name, (row, block, thread), loads)

    def offset(row: Expr, block: Expr, total: Buffer) -> Expr:
        return stages.value(xoffset.name, (row, block), {"sum_of_whole": of(total)})

    @T.macro
    def quantize(value, row, block, thread, kept, largest, scales, whole):  # type: ignore[no-untyped-def]
        kept[0] = value
        find_greatest(magnitude(kept[0]), largest, 0)
        scales[0] = scale(row, block, largest)
        whole[0] = T.Cast("int32", whole_number(row, block, thread, kept, scales))
        xq[row, block, thread] = T.Cast("int8", whole[0])
        add_lanes(whole[0], whole, 0)
        if thread == 0:
            xs[row, block] = scales[0]
            xoffset[row, block] = offset(row, block, whole)

    return quantize  # type: ignore[no-any-return]
