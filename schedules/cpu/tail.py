"""Schedule the stages after a matrix product: the task that computed some columns goes on with them
while they are in its core's caches."""

import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.tirx import For, PrimFunc, SeqStmt, Stmt
from tvm_ffi import structural_map

from ...targets import Target
from ..records import Choose
from ..tail import one_after_the_other, parts_of_root, rooted
from .rows import rows
from .stages import vectorize, zero_shares


def with_tail(
    product: PrimFunc, tail: PrimFunc | None, columns: int, target: Target, choose: Choose
) -> Schedule:
    """Append the tail to the scheduled product, whose body is one loop over its tasks.

    The tasks share the product's `columns` evenly. Where the tail needs several columns together,
    tasks grow until each has them.
    """
    if tail is None:
        return Schedule(product)
    needed = tail.attrs.get("columns_needed")
    if needed is None:
        scheduled = rows(tail, target, choose)
        assert scheduled is not None
        return Schedule(one_after_the_other(product, scheduled.mod["main"]))
    (loop,), buffers = parts_of_root(product)
    count = int(loop.extent)
    together = math.lcm(int(needed), columns // count) // (columns // count)
    tail_statements, tail_buffers = parts_of_root(_in_tasks(tail, count // together, target))
    task, step = tirx.Var("task", "int64"), tirx.Var("step", "int64")
    steps = _loop(step, together, tirx.ForKind.SERIAL, _iteration(loop, task * together + step))
    kept = [_iteration(stage, task) for stage in tail_statements]
    body = _loop(task, count // together, loop.kind, SeqStmt([steps, *kept]))
    return Schedule(product.with_body(rooted([body], [*buffers, *tail_buffers])))


def _in_tasks(tail: PrimFunc, count: int, target: Target) -> PrimFunc:
    """Make every stage a loop over `count` tasks, which share its columns evenly."""
    sch = Schedule(tail)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        row, column = sch.get_loops(block)[:2]
        task, _ = sch.split(column, [count, None])
        sch.reorder(task, row)
        zero_shares(sch, vectorize(sch, block, target))
    return sch.mod["main"]


def _iteration(loop: For, at: tirx.Var) -> Stmt:
    return structural_map(loop.body, (tirx.Var, lambda v: at if v.same_as(loop.loop_var) else v))


def _loop(variable: tirx.Var, count: int, kind: int, body: Stmt) -> For:
    zero, extent = (tirx.const(value, "int64") for value in (0, count))
    return For(variable, zero, extent, kind, body)
