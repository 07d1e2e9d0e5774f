"""The fallback: every stage over the cores by its first loop, in vectors along its last."""

import math

from tvm import s_tir, tirx
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import PrimFunc

from ...targets import Target
from ..records import Choose
from .matvec import zero_first

# Waking the other cores takes about as long as one core needs for so many elements.
MIN_PARALLEL_ELEMENTS = 1 << 16


def rows(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule any kernel made of blocks, correctly if not quickly."""
    sch = s_tir.Schedule(function)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_stage(sch, block, target)
    return sch


def _schedule_stage(sch: Schedule, block: SBlockRV, target: Target) -> None:
    loops = list(sch.get_loops(block))
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
    shares = None
    if _fills_vectors(extents[-1], target):
        if last == loops[-1] and len(spatial) > 1:
            *_, lane = sch.split(last, [None, target.vector_lanes])
            sch.vectorize(lane)
        elif loops[:-1] == spatial:
            shares = _reduce_in_lanes(sch, block, len(spatial), target)
    if symbolic or elements >= MIN_PARALLEL_ELEMENTS:
        sch.parallel(first)
    if shares is not None:  # last: it leaves a block that no primitive takes
        zero_first(sch, shares, sch.get_loops(shares)[-2])


def _fills_vectors(extent: Expr, target: Target) -> bool:
    return isinstance(extent, tirx.IntImm) and extent.value % target.vector_lanes == 0


def _reduce_in_lanes(sch: Schedule, block: SBlockRV, num_spatial: int, target: Target) -> SBlockRV:
    """Every lane of a vector reduces its share of the last loop, and then the lanes are reduced;
    returns the block of the shares, not zeroed yet."""
    *outer, last = sch.get_loops(block)
    *_, lane = sch.split(last, [None, target.vector_lanes])
    shares = sch.rfactor(lane, num_spatial)
    sch.compute_at(shares, outer[-1], preserve_unit_loops=True)
    lane, *units, step = sch.get_loops(shares)[len(outer) :]
    sch.reorder(*units, step, lane)
    sch.vectorize(lane)
    return shares
