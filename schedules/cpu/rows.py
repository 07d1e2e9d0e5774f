"""The fallback: the cores share the first loop of every stage, and vectors run along its last."""

from tvm import s_tir
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import PrimFunc

from ...targets import Target
from ..records import Choose
from .stages import is_large, vectorize, zero_shares


def rows(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule any kernel made of blocks, correctly if not quickly."""
    sch = s_tir.Schedule(function)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_stage(sch, block, target)
    return sch


def _schedule_stage(sch: Schedule, block: SBlockRV, target: Target) -> None:
    extents = [sch.get(loop).extent for loop in sch.get_loops(block)]
    shares = vectorize(sch, block, target)
    if is_large(extents):
        sch.parallel(sch.get_loops(block)[0])
    zero_shares(sch, shares)
