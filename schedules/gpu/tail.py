"""What follows a matrix product, in launches of its own."""

from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from ...targets import Target
from ..records import Choose
from ..tail import parts_of_root, rooted
from .threads import threads


def with_tail(product: PrimFunc, tail: PrimFunc | None, target: Target, choose: Choose) -> Schedule:
    """The scheduled product, and after it the tail."""
    if tail is None:
        return Schedule(product)
    scheduled = threads(tail, target, choose)
    assert scheduled is not None
    statements, buffers = parts_of_root(product)
    more, more_buffers = parts_of_root(scheduled.mod["main"])
    return Schedule(product.with_body(rooted([*statements, *more], [*buffers, *more_buffers])))
