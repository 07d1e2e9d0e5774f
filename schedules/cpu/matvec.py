"""Schedule the matrix products of a few rows of activations, whose speed memory limits: the cores
share the rows of weights, and a vector holds 8 of them. Those by byte products are in
`few_int8.py`.

The weights' layout puts the same word of `vector_lanes` consecutive rows side by side (see
`osscompile/passes/pack_weights.py`), so that every vector holds one word each of 8 rows.
"""

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import PrimFunc

from ...targets import Target
from ..product import OPS, whole_parts
from ..records import Choose
from ..tail import split_tail
from .few_int8 import ROW_GROUPS_PER_TASK
from .stages import zero_first
from .tail import with_tail

# Without blocks a group's sum is one chain of additions: several groups hide each other's latency.
GROUPS_TOGETHER = (1, 2, 4, 8)


def matvec(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS`; declines others, and weights whose rows do not fill vectors."""
    op = str(function.attrs["op"])
    if op not in OPS:
        return None
    product, tail = split_tail(function)
    sch = Schedule(product)
    acc, out = sch.get_sblock("acc"), sch.get_sblock("out")
    num_rows = sch.get(sch.get_loops(out)[-1]).extent.value
    if num_rows % target.vector_lanes:
        return None
    in_blocks = op.endswith(("_q8", "_digits"))
    groups = num_rows // target.vector_lanes
    together = 1
    if not in_blocks:
        together = choose("groups_together", *whole_parts(groups, GROUPS_TOGETHER, 4))
    limit = choose("row_groups_per_task", ROW_GROUPS_PER_TASK, 8) // together
    per_task = max(d for d in range(1, max(1, limit) + 1) if groups // together % d == 0)

    activation, row = sch.get_loops(out)
    task, group, member, lane = sch.split(row, [None, per_task, together, target.vector_lanes])
    sch.reorder(task, activation, group, member, lane)
    if groups > per_task * together:
        sch.parallel(task)
    sch.vectorize(lane)
    sch.compute_at(acc, group, preserve_unit_loops=True)
    if in_blocks:
        _schedule_blocks_of_32(sch, acc)
    else:
        _schedule_inputs(sch, acc, target)
    return with_tail(sch.mod["main"], tail, num_rows, target, choose)


def _schedule_blocks_of_32(sch: Schedule, acc: SBlockRV) -> None:
    """Schedule acc += dot * scale over the blocks; `dot` computes one block of 8 rows at a time."""
    *halves, lane, block = _own_loops(sch, acc)
    sch.reorder(block, *halves, lane)
    sch.vectorize(lane)
    for half in halves:
        sch.unroll(half)
    dot = sch.get_sblock("dot")
    sch.compute_at(dot, halves[-1] if halves else block, preserve_unit_loops=True)
    zero_first(sch, acc, block)
    lane, k = sch.get_loops(dot)[-2:]
    sch.reorder(k, lane)
    sch.vectorize(lane)
    sch.unroll(k)
    zero_first(sch, dot, k)


def _schedule_inputs(sch: Schedule, acc: SBlockRV, target: Target) -> None:
    """Schedule acc += weight * x, one input at a time, for some vectors of rows by turns."""
    row, k = _own_loops(sch, acc)
    member, lane = sch.split(row, [None, target.vector_lanes])
    sch.reorder(k, member, lane)
    sch.unroll(member)
    sch.vectorize(lane)
    zero_first(sch, acc, k)


def _own_loops(sch: Schedule, acc: SBlockRV) -> list[LoopRV]:
    """Return the loops that compute_at gave `acc`, except the outer one of extent 1."""
    shared = len(sch.get_loops(sch.get_sblock("out"))) - 2  # all but the rows of a group
    return list(sch.get_loops(acc)[shared + 1 :])
