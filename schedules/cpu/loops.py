"""Schedule kernels written as plain loops, by what the names of their loops promise.

Such kernels (attention, routing) carry state from one iteration to the next, which the schedule
primitives cannot see through: see `osscompile/kernels/attention.py` for the names.
"""

from tvm import s_tir, tirx
from tvm.tirx import For, ForKind, PrimFunc
from tvm_ffi import structural_map

from ...targets import Target
from ..records import Choose
from .stages import is_large


def loops(function: PrimFunc, target: Target, choose: Choose) -> s_tir.Schedule | None:
    """Parallelise `task`, vectorise `lane`; declines kernels made of blocks."""
    if not isinstance(function.body, tirx.For | tirx.SeqStmt):
        return None
    worth_it = any(is_large(list(parameter.shape)) for parameter in function.params)

    def annotate(loop: For) -> For:
        extent = loop.extent.value if isinstance(loop.extent, tirx.IntImm) else None
        if loop.loop_var.name == "task" and extent != 1 and worth_it:
            kind = ForKind.PARALLEL
        elif loop.loop_var.name == "lane" and extent is not None:
            kind = ForKind.VECTORIZED
        else:
            return loop
        return For(loop.loop_var, loop.min, loop.extent, kind, loop.body)

    return s_tir.Schedule(function.with_body(structural_map(function.body, (For, annotate))))
