"""The fallback: each tensor that a kernel returns is a launch of its own, with a thread an element.

A thread computes the stages in between that it needs: a sum in a loop, any other stage within the
result's expression.
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
    for block in reversed(sch.get_child_blocks(root)):  # consumers before what they need
        if sch.get(block).name_hint in results:
            elements = sch.fuse(*sch.get_loops(block)[: num_axes(sch, block)])
            group, thread = sch.split(elements, [None, target.subgroup_size])
            sch.bind(group, "blockIdx.x")
            sch.bind(thread, "threadIdx.x")
        elif is_sum(sch, block):
            (consumer,) = sch.get_consumers(block)
            sch.compute_at(block, sch.get_loops(consumer)[-1], preserve_unit_loops=True)
            sch.set_scope(block, 0, "local")
        else:
            sch.compute_inline(block)
    return sch


def is_sum(sch: Schedule, block: SBlockRV) -> bool:
    return num_axes(sch, block) < len(sch.get_loops(block))


def num_axes(sch: Schedule, block: SBlockRV) -> int:
    """Count the axes of the tensor that a stage computes."""
    return sum(axis.iter_type == IterVar.DataPar for axis in sch.get(block).iter_vars)
