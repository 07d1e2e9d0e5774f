"""Schedule one stage of a kernel in vectors along its last loop."""

import math
from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from ...targets import Target

# Waking the other cores takes about as long as one core takes for this many elements.
MIN_PARALLEL_ELEMENTS = 1 << 16


def is_large(extents: Sequence[Expr]) -> bool:
    """Whether the elements are worth more than one core; an unknown number is."""
    known = [int(extent) for extent in extents if isinstance(extent, tirx.IntImm)]
    return len(known) < len(extents) or math.prod(known) >= MIN_PARALLEL_ELEMENTS


def vectorize(sch: Schedule, block: SBlockRV, target: Target) -> SBlockRV | None:
    """Put the lanes of the last loop in vectors.

    For a sum over them, returns the block of each lane's share. The caller passes it to
    `zero_shares` when all else is done, because no primitive takes the block that this leaves.
    """
    loops = list(sch.get_loops(block))
    kinds = [axis.iter_type for axis in sch.get(block).iter_vars]
    num_axes = kinds.count(tirx.IterVar.DataPar)
    num_summed = len(kinds) - num_axes  # the loops over them come last
    if num_axes and _fills_vectors(sch.get(loops[-1]).extent, target):
        if num_summed == 0 and num_axes > 1:
            *_, lane = sch.split(loops[-1], [None, target.vector_lanes])
            sch.vectorize(lane)
        elif num_summed == 1:
            return _sum_in_lanes(sch, block, num_axes, target)
    return None


def zero_shares(sch: Schedule, shares: SBlockRV | None) -> None:
    """Set the lanes' shares of a sum to zero, in vectors."""
    if shares is not None:
        zero_first(sch, shares, sch.get_loops(shares)[-2])


def zero_first(sch: Schedule, block: SBlockRV, loop: LoopRV) -> None:
    """Set the accumulators to zero before `loop`, in vectors."""
    init = sch.decompose_reduction(block, loop)
    lane = sch.get_loops(init)[-1]
    if sch.get(lane).kind == tirx.ForKind.SERIAL:
        sch.vectorize(lane)


def _fills_vectors(extent: Expr, target: Target) -> bool:
    return isinstance(extent, tirx.IntImm) and extent.value % target.vector_lanes == 0


def _sum_in_lanes(sch: Schedule, block: SBlockRV, num_axes: int, target: Target) -> SBlockRV:
    """Let every lane of a vector reduce its share of the last loop, and then reduce the lanes.

    Returns the block of the shares, not zeroed yet. `num_axes` counts the result's axes.
    """
    *outer, last = sch.get_loops(block)
    *_, lane = sch.split(last, [None, target.vector_lanes])
    shares = sch.rfactor(lane, num_axes)
    sch.compute_at(shares, outer[-1], preserve_unit_loops=True)
    lane, *units, step = sch.get_loops(shares)[len(outer) :]
    sch.reorder(*units, step, lane)
    sch.vectorize(lane)
    return shares
