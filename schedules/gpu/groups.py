"""Kernels of several stages in one launch: a work-group computes everything of one row, or of one
part of a row, stage after stage.

A group has the elements of all stages that agree in their first axes. Sums that a later stage reads
lie in shared memory; other stages are written into the expression that reads them. All threads
compute a sum together that is alone in its group.
"""

import math

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import IterVar, PrimFunc, SeqStmt
from tvm_ffi import structural_equal, structural_map

from ...targets import Target
from ..records import Choose
from ..tail import parts_of_root, rooted
from .tasks import bound
from .threads import THREADS, WORD_BITS, is_sum


def groups(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule kernels with several stages that agree in their first axis, or with one that is a
    sum; declines others."""
    sch = Schedule(function)
    root = sch.get_sblock("root")
    results = {sch.get(block).name_hint for block in sch.get_output_blocks(root)}
    for block in sch.get_child_blocks(root):
        if sch.get(block).name_hint not in results and not is_sum(sch, block):
            sch.compute_inline(block)
    stages = sch.get_child_blocks(root)
    prefix = _common_prefix([_axes(sch, block) for block in stages])
    if prefix == 0 or (len(stages) == 1 and not is_sum(sch, stages[0])):
        return None
    if target.load_bits > WORD_BITS and _have_same_elements(sch, stages):
        for block in stages:
            _, thread = sch.split(sch.fuse(*sch.get_loops(block)), [None, THREADS])
            sch.bind(thread, "threadIdx.x")
        return _with_one_grid(function, sch)
    while prefix > 1 and _most(sch, stages, prefix) < target.subgroup_size:
        prefix -= 1  # threads without work are worse than fewer groups
    alone = [block for block in stages if _is_alone(sch, block, prefix)]
    # a sum of one number cannot be shared out
    if any(_elements(sch, block, prefix) == 1 for block in alone):
        return None
    for block in stages:
        consumers = sch.get_consumers(block)
        if sch.get(block).name_hint not in results:
            sch.set_scope(block, 0, "shared")
        elif consumers:
            sch.cache_write(block, 0, "shared", consumers)
    subgroups = -(-_most(sch, stages, prefix) // target.subgroup_size)
    threads = min(target.max_threads, subgroups * target.subgroup_size)
    for block in sch.get_child_blocks(root):
        loops = sch.get_loops(block)
        num_axes = len(_axes(sch, block))
        own = loops[num_axes:] if _is_alone(sch, block, prefix) else loops[prefix:num_axes]
        _, unit = sch.split(sch.fuse(*loops[:prefix]), [None, 1])
        shared = sch.fuse(*(own or [unit]))
        _, thread = sch.split(shared, [None, threads])
        sch.bind(thread, "threadIdx.x")
    return _with_one_grid(function, sch)


def _with_one_grid(function: PrimFunc, sch: Schedule) -> Schedule:
    """Bind the outer loop of all stages to the same groups."""
    statements, buffers = parts_of_root(sch.mod["main"])
    group = tirx.Var("group", "int64")
    bodies = [
        structural_map(s.body, (tirx.Var, lambda v, s=s: group if v.same_as(s.loop_var) else v))
        for s in statements
    ]
    body = SeqStmt(bodies) if len(bodies) > 1 else bodies[0]
    loop = bound(group, statements[0].extent, "blockIdx.x", body)
    return Schedule(function.with_body(rooted([loop], buffers)))


def _have_same_elements(sch: Schedule, stages: list[SBlockRV]) -> bool:
    """Whether all stages compute tensors of the same extents, and none is a sum or read by another:
    threads may then have an element of each."""
    axes = [_axes(sch, block) for block in stages]
    same = len({len(a) for a in axes}) == 1 and _common_prefix(axes) == len(axes[0])
    return same and not any(is_sum(sch, b) or sch.get_consumers(b) for b in stages)


def _axes(sch: Schedule, block: SBlockRV) -> list[Expr]:
    """Return the extents of the tensor that a stage computes."""
    return [a.dom.extent for a in sch.get(block).iter_vars if a.iter_type == IterVar.DataPar]


def _common_prefix(axes: list[list[Expr]]) -> int:
    count = 0
    for extents in zip(*axes, strict=False):
        if not all(structural_equal(e, extents[0]) for e in extents):
            break
        count += 1
    return count


def _most(sch: Schedule, stages: list[SBlockRV], prefix: int) -> int:
    return max(_elements(sch, block, prefix) for block in stages)


def _elements(sch: Schedule, block: SBlockRV, prefix: int) -> int:
    """Count a stage's elements in a group, or the terms of a sum that is alone there."""
    extents = _axes(sch, block)[prefix:]
    if _is_alone(sch, block, prefix):
        variables = sch.get(block).iter_vars
        extents = [v.dom.extent for v in variables if v.iter_type == IterVar.CommReduce]
    return math.prod(map(int, extents))


def _is_alone(sch: Schedule, block: SBlockRV, prefix: int) -> bool:
    """Whether a stage computes a single sum in a group."""
    return is_sum(sch, block) and math.prod(map(int, _axes(sch, block)[prefix:])) == 1
