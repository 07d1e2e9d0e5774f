"""The fallback: every tensor that a kernel returns in a launch of its own, a thread an element.

What lies between the arguments and a result is computed where the result needs it: written into
its expression, or, if it is a sum, summed by the thread that needs it; a sum that the elements of
a row share (a norm's), by all threads of a group together.
"""

from tvm import s_tir
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import IterVar, PrimFunc

from ...targets import Target
from ..records import Choose


def threads(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule any kernel made of blocks, correctly if not quickly."""
    sch = s_tir.Schedule(function)
    root = sch.get_sblock("root")
    results = {sch.get(block).name_hint for block in sch.get_output_blocks(root)}
    for block in reversed(sch.get_child_blocks(root)):  # what needs a stage, before the stage
        if sch.get(block).name_hint in results:
            within = [b for b in sch.get_producers(block) if sch.get(b).name_hint not in results]
            sums = [b for b in within if _is_sum(sch, b)]
            _launch(sch, block, _shared_axes(sch, block, sums), target)
        elif _is_sum(sch, block):
            _sum_where_needed(sch, block, target)
        else:
            sch.compute_inline(block)
    return sch


def _launch(sch: Schedule, block: SBlockRV, row_axes: int, target: Target) -> None:
    """A thread an element; or, of rows along the first axes, a group a row."""
    loops = sch.get_loops(block)[: _num_axes(sch, block)]  # a sum is the thread's own
    if row_axes:
        group = sch.fuse(*loops[:row_axes])
        _, thread = sch.split(sch.fuse(*loops[row_axes:]), [None, target.max_threads])
    else:
        group, thread = sch.split(sch.fuse(*loops), [None, target.subgroup_size])
    sch.bind(group, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")


def _sum_where_needed(sch: Schedule, block: SBlockRV, target: Target) -> None:
    (consumer,) = sch.get_consumers(block)
    loops = sch.get_loops(consumer)
    if not _shared_axes(sch, consumer, [block]):
        sch.compute_at(block, loops[-1], preserve_unit_loops=True)
        sch.set_scope(block, 0, "local")
        return
    sch.compute_at(block, loops[0], preserve_unit_loops=True)
    sch.set_scope(block, 0, "shared")
    _, thread = sch.split(sch.get_loops(block)[-1], [None, target.max_threads])
    sch.bind(thread, "threadIdx.x")


def _shared_axes(sch: Schedule, block: SBlockRV, producers: list[SBlockRV]) -> int:
    """Axes of a sum among `producers` that several elements of `block` share; 0 without one."""
    axes = (_num_axes(sch, producer) for producer in producers)
    return min((n for n in axes if n < _num_axes(sch, block)), default=0)


def _is_sum(sch: Schedule, block: SBlockRV) -> bool:
    return _num_axes(sch, block) < len(sch.get_loops(block))


def _num_axes(sch: Schedule, block: SBlockRV) -> int:
    """Of the tensor that a stage computes."""
    return sum(axis.iter_type == IterVar.DataPar for axis in sch.get(block).iter_vars)
