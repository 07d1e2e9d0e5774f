"""The fallback: each tensor that a kernel returns is a launch of its own, with a thread an element.

A thread computes the stages in between that it needs: a sum in a loop, any other stage within the
result's expression. Where the target's threads load and store vectors, a thread has as many
elements side by side.
"""

import math

from tvm import s_tir
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import IntImm, IterVar, PrimFunc

from ...targets import Target
from ..records import Choose

# Of a group whose threads have vectors. To begin smaller groups takes longer than what they do.
THREADS = 256
WORD_BITS = 32  # of most elements


def threads(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule any kernel made of blocks, correctly if not quickly."""
    sch = s_tir.Schedule(function)
    root = sch.get_sblock("root")
    blocks = sch.get_child_blocks(root)
    results = {sch.get(block).name_hint for block in sch.get_output_blocks(root)}
    wide = target.load_bits > WORD_BITS and not any(is_sum(sch, block) for block in blocks)
    for block in reversed(blocks):  # consumers before what they need
        if sch.get(block).name_hint in results:
            _bind(sch, block, target, wide)
        elif is_sum(sch, block):
            (consumer,) = sch.get_consumers(block)
            sch.compute_at(block, sch.get_loops(consumer)[-1], preserve_unit_loops=True)
            sch.set_scope(block, 0, "local")
        else:
            sch.compute_inline(block)
    return sch


def _bind(sch: Schedule, block: SBlockRV, target: Target, wide: bool) -> None:
    axes = sch.get_loops(block)[: num_axes(sch, block)]
    lanes = _lanes(sch.get(axes[-1]).extent, target) if wide else 1
    if lanes > 1:
        axes[-1], lane = sch.split(axes[-1], [None, lanes])
        sch.vectorize(lane)
    group, thread = sch.split(sch.fuse(*axes), [None, THREADS if wide else target.subgroup_size])
    sch.bind(group, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")


def _lanes(extent: Expr, target: Target) -> int:
    """Return how many neighbours of a row fill a thread's vector, or divide the row. What is read
    side by side begins at such multiples too: heads, and rows of any tensor, do."""
    wanted = target.load_bits // WORD_BITS
    return math.gcd(int(extent), wanted) if isinstance(extent, IntImm) else 1


def is_sum(sch: Schedule, block: SBlockRV) -> bool:
    return num_axes(sch, block) < len(sch.get_loops(block))


def num_axes(sch: Schedule, block: SBlockRV) -> int:
    """Count the axes of the tensor that a stage computes."""
    return sum(axis.iter_type == IterVar.DataPar for axis in sch.get(block).iter_vars)
