"""Products of bfloat16 by a warp: 16 rows of weights with 8 rows of activations, 16 inputs at a
time, on NVIDIA's GPUs.

`MMA`(sums, weights, activations) names a function that a target's source begins with. It takes the
addresses of a lane's four sums, float32, of its four words of weights and of its two words of
activations. Lanes hold what NVIDIA's description of PTX says for mma.m16n8k16.

`LEAVE`(to, sum) stores a sum for another warp. TVM does not see what a function stores, and so
waits for it nowhere: schedules that use it wait themselves.
"""

from tvm.ir import Expr

MMA = "mma_bf16_16x8x16"
LEAVE = "leave_sum"
WARP = 32
ROWS = 16  # of weights, in a product
TOKENS = 8  # rows of activations, in a product
SUMS = 4  # of a lane


def row(lane: Expr) -> Expr:
    """Return the first of a lane's two rows of weights, and its row of activations; the other row
    of weights is 8 below."""
    return lane // 4


def quarter(lane: Expr) -> Expr:
    """Return which quarter of the inputs a lane has."""
    return lane % 4


def token(lane: Expr, i: Expr) -> Expr:
    """Return the row of activations of a lane's i-th sum; its weights' row is i // 2 % 2."""
    return i // SUMS * TOKENS + lane % 4 * 2 + i % 2
