"""Schedule the matrix products of a few rows of activations, whose speed memory limits: the cores
share the rows of weights, and a vector holds 8 of them.

The weights' layout puts the same word of `vector_lanes` consecutive rows side by side (see
`osscompile/passes/pack_weights.py`), so that every vector holds one word each of 8 rows.
"""

from collections.abc import Callable
from types import ModuleType

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import PrimFunc

from ...targets import Target
from ..product import OPS, whole_parts
from ..records import Choose
from ..tail import split_tail
from .blocks import mxfp4_block, mxfp4_digits_block, q8_block
from .instructions import INSTRUCTIONS
from .stages import zero_first
from .tail import with_tail

# Row groups (of vector_lanes rows) that one parallel task computes, at most: fewer leave the cores
# waiting for each other, more leave some cores without work at the end.
ROW_GROUPS_PER_TASK = (2, 4, 6, 8, 12, 16, 24, 32)
# (the end of the operation's name, the intrinsic for its blocks)
BLOCKS = (("dense_q8", q8_block), ("_q8", mxfp4_block), ("_digits", mxfp4_digits_block))
# Without blocks a group's sum is one chain of additions: several groups hide each other's latency.
GROUPS_TOGETHER = (1, 2, 4, 8)
PREFETCH_BYTES = (512, 1024, 2048, 4096, 8192)  # how far ahead weights are fetched


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
    block_of = next((block for suffix, block in BLOCKS if op.endswith(suffix)), None)
    groups = num_rows // target.vector_lanes
    together = 1
    if block_of is None:
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
    if block_of is None:
        _schedule_inputs(sch, acc, target)
    else:
        _schedule_blocks_of_32(sch, acc, block_of, target, choose)
    return with_tail(sch.mod["main"], tail, num_rows, target, choose)


def _schedule_blocks_of_32(
    sch: Schedule,
    acc: SBlockRV,
    block_of: Callable[[ModuleType, int], str],
    target: Target,
    choose: Choose,
) -> None:
    """Schedule acc += dot * scale over the blocks; `dot` computes one block of 8 rows at a time."""
    *halves, lane, block = _own_loops(sch, acc)
    # gate and up by turns share activations in registers; one after the other, each has more sums
    by_turns = halves and choose(
        "halves_by_turns", (0, 1), 0 if block_of is mxfp4_digits_block else 1
    )
    inner, outer = (halves, []) if by_turns else ([], halves)
    sch.reorder(*outer, block, *inner, lane)
    sch.vectorize(lane)
    for loop in inner:
        sch.unroll(loop)
    dot = sch.get_sblock("dot")
    sch.compute_at(dot, inner[-1] if inner else block, preserve_unit_loops=True)
    zero_first(sch, acc, block)
    lane, k = sch.get_loops(dot)[-2:]
    if target.int8_dot in INSTRUCTIONS:
        zero_first(sch, dot, lane)
        lane = sch.get_loops(dot)[-2]
        instructions = INSTRUCTIONS[target.int8_dot]
        distance = choose("prefetch_bytes", PREFETCH_BYTES, 2048)
        sch.tensorize(lane, block_of(instructions, distance))
    else:
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
