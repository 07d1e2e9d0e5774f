"""The fallback: every stage over the cores by its first loop, in vectors along its last."""

import math

from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import PrimFunc

from ...targets import Target
from ..records import Choose

# Waking the other cores takes about as long as one core needs for so many elements.
MIN_PARALLEL_ELEMENTS = 1 << 16


def rows(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule any kernel made of blocks, correctly if not quickly."""
    sch = s_tir.Schedule(function)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_stage(sch, block, target)
    return sch


def _schedule_stage(sch: Schedule, block: SBlockRV, target: Target) -> None:
    loops = sch.get_loops(block)
    kinds = [axis.iter_type for axis in sch.get(block).iter_vars]
    spatial = [
        loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar
    ]
    if not spatial:
        return
    first, last = spatial[0], spatial[-1]
    extents = [sch.get(loop).extent for loop in loops]
    elements = math.prod(e.value for e in extents if isinstance(e, tirx.IntImm))
    symbolic = any(not isinstance(e, tirx.IntImm) for e in extents)
    if len(spatial) > 1 and last == loops[-1]:
        extent = sch.get(last).extent
        if isinstance(extent, tirx.IntImm) and extent.value % target.vector_lanes == 0:
            *_, lane = sch.split(last, [None, target.vector_lanes])
            sch.vectorize(lane)
    if symbolic or elements >= MIN_PARALLEL_ELEMENTS:
        sch.parallel(first)
