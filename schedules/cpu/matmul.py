"""Schedule the matrix products: rows over the cores, 8 rows in a vector, tokens unrolled.

The weights' layout puts the same word of `vector_lanes` consecutive rows side by side (see
`osscompile/passes/pack_weights.py`), so that every vector holds one word each of 8 rows.
"""

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import PrimFunc

from ...targets import Target
from ..records import Choose
from . import maddubs

OPS = (
    "moe_mxfp4",
    "moe_mxfp4_q8",
    "moe_mxfp4_swiglu",
    "moe_mxfp4_swiglu_q8",
    "dense_q8",
    "dense_bf16",
)

# Row groups (of vector_lanes rows) that one parallel task computes, at most: fewer leave the cores
# waiting for each other, more outgrow the second-level cache when tiles of tokens follow.
ROW_GROUPS_PER_TASK = (2, 4, 6, 8, 12, 16, 24, 32)


def matmul(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS`; declines others, and rows that do not fill vectors."""
    if str(function.attrs["op"]) not in OPS:
        return None
    sch = Schedule(function)
    acc, out = sch.get_sblock("acc"), sch.get_sblock("out")
    tile = _extent(sch, sch.get_loops(out)[1])
    rows = _extent(sch, sch.get_loops(out)[-1])
    if rows is None or rows % target.vector_lanes:
        return None
    limit = choose("row_groups_per_task", ROW_GROUPS_PER_TASK, 12)

    tiles, token, row = sch.get_loops(out)
    groups = rows // target.vector_lanes
    per_task = max(d for d in range(1, limit + 1) if groups % d == 0)
    task, group, lane = sch.split(row, [None, per_task, target.vector_lanes])
    sch.reorder(task, tiles, group, token, lane)
    if groups > per_task:
        sch.parallel(task)
    sch.vectorize(lane)
    sch.unroll(token)

    sch.compute_at(acc, group, preserve_unit_loops=True)
    sch.set_scope(acc, 0, "local")
    names = [sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))]
    if "dot" in names:
        _schedule_blocks_of_32(sch, acc, target, prefetch=tile == 1)
    else:
        _schedule_inputs(sch, acc)
    return sch


def _schedule_blocks_of_32(sch: Schedule, acc: SBlockRV, target: Target, prefetch: bool) -> None:
    """acc += dot * scale over the blocks, with `dot` computed one block of 8 rows at a time."""
    *_, block = loops = _own_loops(sch, acc)
    lane = loops[-2]
    sch.reorder(block, *loops[:-1])
    sch.vectorize(lane)
    for loop in loops[:-2]:
        sch.unroll(loop)
    dot = sch.get_sblock("dot")
    sch.compute_at(dot, loops[-3], preserve_unit_loops=True)
    sch.set_scope(dot, 0, "local")
    _zero_first(sch, acc, block)
    lane, k = sch.get_loops(dot)[-2:]
    integer = sch.get(dot).writes[0].source.dtype == "int32"
    if integer and target.int8_dot == "maddubs":
        _zero_first(sch, dot, lane)
        lane = sch.get_loops(dot)[-2]
        fp4 = len(sch.get(dot).reads) == 4  # beside sums, weights and x: which expert
        block_of = maddubs.mxfp4_block if fp4 else maddubs.q8_block
        sch.tensorize(lane, block_of(prefetch))
    else:
        sch.reorder(k, lane)
        sch.vectorize(lane)
        sch.unroll(k)
        _zero_first(sch, dot, k)


def _schedule_inputs(sch: Schedule, acc: SBlockRV) -> None:
    """acc += weight * x, one input at a time, 8 rows a vector."""
    loops = _own_loops(sch, acc)
    *tokens, lane, k = loops
    sch.reorder(k, *tokens, lane)
    sch.vectorize(lane)
    for loop in tokens:
        sch.unroll(loop)
    _zero_first(sch, acc, k)


def _zero_first(sch: Schedule, block: SBlockRV, loop: LoopRV) -> None:
    """Set the accumulators to zero before `loop`, in vectors."""
    init = sch.decompose_reduction(block, loop)
    lane = sch.get_loops(init)[-1]
    if sch.get(lane).kind == tirx.ForKind.SERIAL:
        sch.vectorize(lane)


def _own_loops(sch: Schedule, block: SBlockRV) -> list[LoopRV]:
    """The loops that a block got by compute_at, without the outer ones of extent 1 (the tile)."""
    loops = sch.get_loops(block)
    shared = len(sch.get_loops(sch.get_sblock("out"))) - 2  # all but tokens and lanes
    return list(loops[shared + 1 :])


def _extent(sch: Schedule, loop: LoopRV) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None
