"""The kernels of one token's experts, which `osscompile/passes/join_experts.py` makes."""

import math

from tvm.tirx import PrimFunc

from ...targets import Target
from ..formats import BLOCK
from .expert_parts import takes_parts
from .lanes import LANES

ROUTE_OP = "route_step_q8"
SWIGLU_OP = "moe_mxfp4_swiglu_step_q8"
SUM_OP = "moe_mxfp4_sum_step_q8"
SHARED_BYTES = 40 << 10  # for the activations of all experts, at most
TURNS = 8  # of the blocks of the norm's row, at most: a thread has as many numbers in registers


def takes_one_token(route: PrimFunc, swiglu: PrimFunc, target: Target) -> bool:
    """Whether there are schedules of such kernels: subgroups quantise blocks, and read weights that
    lie row by row."""
    words = next(p for p in swiglu.params if p.name == "words")
    whole_numbers = swiglu.params[-3]  # a row for each expert
    return (
        takes_parts(target)
        and len(words.shape) == 5
        and int(words.shape[2]) % BLOCK == 0
        and math.prod(map(int, whole_numbers.shape)) <= SHARED_BYTES
        and num_turns(int(route.params[0].shape[1]) // BLOCK, target) <= TURNS
    )


def num_members(blocks: int, target: Target) -> int:
    """Return how many subgroups share a row of so many blocks evenly."""
    most = min(target.max_threads // LANES, LANES)
    return max(n for n in range(1, most + 1) if blocks % n == 0)


def num_turns(blocks: int, target: Target) -> int:
    return blocks // num_members(blocks, target)
