"""Combine a number of every thread of a subgroup, on targets whose threads can read each other's
registers."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

LANES = 32  # of a subgroup
_ALL = 0xFFFFFFFF


def combined(combine: Callable[[Expr, Expr], Expr]) -> Callable[..., object]:
    """Return a macro (value, result) that sets `result` [1] to all threads' values together, in
    every thread. All of the subgroup must come here."""

    def others(result: Buffer, distance: int) -> Expr:
        return T.tvm_warp_shuffle_xor(T.uint32(_ALL), result[0], distance, LANES, LANES)

    @T.macro
    def combine_all(value, result):  # type: ignore[no-untyped-def]
        result[0] = value
        result[0] = combine(result[0], others(result, 16))
        result[0] = combine(result[0], others(result, 8))
        result[0] = combine(result[0], others(result, 4))
        result[0] = combine(result[0], others(result, 2))
        result[0] = combine(result[0], others(result, 1))

    return combine_all  # type: ignore[no-any-return]


add_lanes = combined(lambda x, y: x + y)
find_greatest = combined(lambda x, y: T.max(x, y))
