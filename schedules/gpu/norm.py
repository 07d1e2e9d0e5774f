"""Schedule the norm whose result is quantised: a work-group computes a row, its subgroups take the
blocks of 32 by turns, and a thread has a number of each in its registers."""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ...targets import Target
from ..formats import BLOCK
from ..records import Choose
from ..stages import Stages, always
from .lanes import LANES, add_lanes
from .launch_before import wait_call
from .quantize_lanes import quantize_lanes

TURNS = 8  # at most: a thread has as many numbers in registers


def norm(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule `rms_norm_q8`; declines others, and rows whose blocks do not fill subgroups."""
    if str(function.attrs["op"]) != "rms_norm_q8" or not target.has_shuffles:
        return None
    assert target.subgroup_size == BLOCK == LANES
    x, weight, out, *quantized = function.params
    num_rows, blocks = x.shape[0], int(x.shape[1]) // BLOCK
    most = min(target.max_threads // BLOCK, BLOCK)
    members = max(n for n in range(1, most + 1) if blocks % n == 0)
    turns = blocks // members
    if turns > TURNS:
        return None
    stages, waits = Stages(function), target.has_dependent_launch
    quantize = quantize_lanes(stages, "out", tuple(quantized))

    def normed(row: Expr, column: Expr, value: Expr, scale: Expr, total: Expr) -> Expr:
        loads = {"x": value, "weight": scale, "total": total}
        return stages.value(
            "out", (row, column), {name: always(loaded) for name, loaded in loads.items()}
        )

    @T.macro
    def normalise(row, member, thread):  # type: ignore[no-untyped-def]
        weights = T.alloc_buffer((turns,), "float32", scope="local")
        values = T.alloc_buffer((turns,), "float32", scope="local")
        some = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        all_members = T.alloc_buffer((members,), "float32", scope="shared")
        kept = T.alloc_buffer((1,), "float32", scope="local")
        largest = T.alloc_buffer((1,), "uint32", scope="local")
        scales = T.alloc_buffer((1,), "float32", scope="local")
        whole = T.alloc_buffer((1,), "int32", scope="local")
        for turn in T.unroll(turns):
            weights[turn] = weight[(turn * members + member) * BLOCK + thread]
        if waits:
            T.evaluate(wait_call())
        some[0] = T.float32(0)
        for turn in T.unroll(turns):
            values[turn] = x[row, (turn * members + member) * BLOCK + thread]
            some[0] += values[turn] * values[turn]
        add_lanes(some[0], total, 0)
        if thread == 0:
            all_members[member] = total[0]
        some[0] = T.Select(thread < members, all_members[T.min(thread, members - 1)], T.float32(0))
        add_lanes(some[0], total, 0)
        for turn in T.unroll(turns):
            values[turn] = normed(
                row,
                (turn * members + member) * BLOCK + thread,
                values[turn],
                weights[turn],
                total[0],
            )
            out[row, (turn * members + member) * BLOCK + thread] = values[turn]
            quantize(
                values[turn],
                row,
                turn * members + member,
                thread,
                kept,
                largest,
                scales,
                whole,
            )

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for row in T.thread_binding(num_rows, thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                for thread in T.thread_binding(T.int64(BLOCK), thread="threadIdx.x"):
                    normalise(row, member, thread)

    return Schedule(function.with_body(body.body))
