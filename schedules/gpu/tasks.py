"""Schedule kernels written as plain loops, by what the names of their loops promise.

Such kernels (attention, routing) carry state from one iteration to the next, which the schedule
primitives cannot see through: see `osscompile/kernels/attention.py` for the names.
"""

from collections.abc import Callable

from tvm import s_tir, tirx
from tvm.ir import Expr
from tvm.tirx import For, ForKind, IterVar, PrimFunc, Stmt
from tvm_ffi import structural_map

from ...targets import Target
from ..records import Choose


def tasks(function: PrimFunc, target: Target, choose: Choose) -> s_tir.Schedule | None:
    """Give every iteration of `task` a thread, and a kernel without that loop one thread; declines
    kernels made of blocks."""
    body = function.body
    if not isinstance(body, tirx.For | tirx.SeqStmt):
        return None
    if isinstance(body, tirx.For) and body.loop_var.name == "task":
        return s_tir.Schedule(function.with_body(_over_threads(body, target.subgroup_size)))
    one = tirx.const(1, "int64")
    return s_tir.Schedule(function.with_body(_grid(one, one, lambda group, thread: body)))


def _over_threads(loop: For, threads: int) -> Stmt:
    per_group = tirx.const(threads, "int64")

    def iteration(group: Expr, thread: Expr) -> Stmt:
        task = group * per_group + thread
        renames = (tirx.Var, lambda v: task if v.same_as(loop.loop_var) else v)
        return tirx.IfThenElse(task < loop.extent, structural_map(loop.body, renames), None)

    return _grid(tirx.ceildiv(loop.extent, per_group), per_group, iteration)


def _grid(groups: Expr, threads: Expr, body_of: Callable[[Expr, Expr], Stmt]) -> Stmt:
    """Run `body_of` (group, thread) in every thread of every group."""
    group, thread = tirx.Var("group", "int64"), tirx.Var("thread", "int64")
    inner = bound(thread, threads, "threadIdx.x", body_of(group, thread))
    return bound(group, groups, "blockIdx.x", inner)


def bound(loop_var: Expr, extent: Expr, index: str, body: Stmt) -> For:
    binding = IterVar(None, index, IterVar.ThreadIndex, index)
    zero = tirx.const(0, "int64")
    return For(loop_var, zero, extent, ForKind.THREAD_BINDING, body, thread_binding=binding)
