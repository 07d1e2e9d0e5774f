"""Schedule what follows a matrix product in launches of its own."""

from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc, Stmt

from ...targets import Target
from ..records import Choose
from ..tail import one_after_the_other, split_tail
from .groups import groups
from .threads import threads


def with_tail(function: PrimFunc, body: Stmt, target: Target, choose: Choose) -> Schedule:
    """Return the kernel whose product `body` computes, with the stages that follow it."""
    product, (_, tail) = function.with_body(body), split_tail(function)
    if tail is None:
        return Schedule(product)
    scheduled = groups(tail, target, choose) or threads(tail, target, choose)
    assert scheduled is not None
    return Schedule(one_after_the_other(product, scheduled.mod["main"]))
