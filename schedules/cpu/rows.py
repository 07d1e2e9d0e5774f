"""The fallback: every stage over the cores by its first loop, in vectors along its last."""

import math

from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import PrimFunc

from ...targets import Target
from ..records import Choose
from .stages import vectorize, zero_shares

# Waking the other cores takes about as long as one core needs for so many elements.
MIN_PARALLEL_ELEMENTS = 1 << 16


def rows(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule any kernel made of blocks, correctly if not quickly."""
    sch = s_tir.Schedule(function)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_stage(sch, block, target)
    return sch


def _schedule_stage(sch: Schedule, block: SBlockRV, target: Target) -> None:
    extents = [sch.get(loop).extent for loop in sch.get_loops(block)]
    elements = math.prod(e.value for e in extents if isinstance(e, tirx.IntImm))
    symbolic = any(not isinstance(e, tirx.IntImm) for e in extents)
    shares = vectorize(sch, block, target)
    if symbolic or elements >= MIN_PARALLEL_ELEMENTS:
        sch.parallel(sch.get_loops(block)[0])
    zero_shares(sch, shares)
