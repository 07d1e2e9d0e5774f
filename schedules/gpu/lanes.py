"""Combine a number of every thread of a subgroup, on targets whose threads can read each other's
registers."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

LANES = 32  # of a subgroup
_ALL = 0xFFFFFFFF


def combined_lanes(combine: Callable[[Expr, Expr], Expr]) -> Callable[..., object]:
    """Return a macro (value, results, i) that sets element i of `results` to all threads' values
    together, in every thread. All of the subgroup must come here."""

    def with_others(results: Buffer, i: Expr, distance: int) -> Expr:
        own = results[i]
        others = T.tvm_warp_shuffle_xor(T.uint32(_ALL), own, distance, LANES, LANES)
        return combine(own, others)

    @T.macro
    def combine_all(value, results, i):  # type: ignore[no-untyped-def]
        results[i] = value
        results[i] = with_others(results, i, 16)
        results[i] = with_others(results, i, 8)
        results[i] = with_others(results, i, 4)
        results[i] = with_others(results, i, 2)
        results[i] = with_others(results, i, 1)

    return combine_all  # type: ignore[no-any-return]


add_lanes = combined_lanes(lambda x, y: x + y)
find_greatest = combined_lanes(lambda x, y: T.max(x, y))


def _other(results: Buffer, distance: int) -> Expr:
    return T.tvm_warp_shuffle_xor(T.uint32(_ALL), results[0], distance, LANES, LANES)


@T.macro
def add_lanes_before(total, before, lane):  # type: ignore[no-untyped-def]
    """Set `before` [1] to the sum of the int32 `total` [1] of all threads before this one, and
    `total` to the sum of all. All of the subgroup must come here."""
    other = T.alloc_buffer((1,), "int32", scope="local")
    before[0] = 0
    for i in T.unroll(5):
        other[0] = _other(total, T.shift_left(1, i))
        before[0] += T.Select(
            T.bitwise_and(T.Cast("int32", lane), T.shift_left(1, i)) != 0, other[0], 0
        )
        total[0] += other[0]
