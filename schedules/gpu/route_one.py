"""Schedule the norm and the router of one token: a work-group for each expert. Each computes the
norm again, whose row its subgroups share as in `norm.py`, and quantises some of its blocks."""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ...targets import Target
from ..formats import BLOCK, bf16_to_float32
from ..records import Choose
from ..stages import Stages, always
from .lanes import LANES, add_lanes
from .launch_before import wait_call
from .of_one_token import ROUTE_OP, num_members
from .quantize_lanes import quantize_lanes


def route_one(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule `ROUTE_OP`; declines others."""
    if str(function.attrs["op"]) != ROUTE_OP:
        return None
    assert target.subgroup_size == BLOCK == LANES
    x, norm, router, _bias, *quantized, logits = function.params
    experts, blocks = int(logits.shape[1]), int(x.shape[1]) // BLOCK
    members = num_members(blocks, target)
    turns = blocks // members
    stages, waits = Stages(function), target.has_dependent_launch
    quantize = quantize_lanes(stages, "out", tuple(quantized))

    def normed(column: Expr, value: Expr, scale: Expr, total: Expr) -> Expr:
        loads = {"x": always(value), "weight": always(scale), "total": always(total)}
        return stages.value("out", (T.int64(0), column), loads)

    def logit(expert: Expr, total: Expr) -> Expr:
        return stages.value("out_1", (T.int64(0), expert), {"acc": always(total)})

    @T.macro
    def add_all(value, all_members, total, member, thread):  # type: ignore[no-untyped-def]
        """Set `total` to the sum of all threads' values."""
        add_lanes(value, total, 0)
        if thread == 0:
            all_members[member] = total[0]
        add_lanes(
            T.Select(thread < members, all_members[T.min(thread, members - 1)], T.float32(0)),
            total,
            0,
        )

    @T.macro
    def route(expert, member, thread):  # type: ignore[no-untyped-def]
        scales = T.alloc_buffer((turns,), "float32", scope="local")
        weights = T.alloc_buffer((turns,), "float32", scope="local")
        values = T.alloc_buffer((turns,), "float32", scope="local")
        some = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        squares = T.alloc_buffer((members,), "float32", scope="shared")
        products = T.alloc_buffer((members,), "float32", scope="shared")
        kept = T.alloc_buffer((1,), "float32", scope="local")
        largest = T.alloc_buffer((1,), "uint32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        whole = T.alloc_buffer((1,), "int32", scope="local")
        for turn in T.unroll(turns):
            scales[turn] = norm[(turn * members + member) * BLOCK + thread]
            weights[turn] = bf16_to_float32(
                router[expert, (turn * members + member) * BLOCK + thread]
            )
        if waits:
            T.evaluate(wait_call())
        for turn in T.unroll(turns):
            values[turn] = x[0, (turn * members + member) * BLOCK + thread]
        some[0] = T.float32(0)
        for turn in T.unroll(turns):
            some[0] += values[turn] * values[turn]
        add_all(some[0], squares, total, member, thread)
        some[0] = T.float32(0)
        for turn in T.unroll(turns):
            values[turn] = normed(
                (turn * members + member) * BLOCK + thread, values[turn], scales[turn], total[0]
            )
            some[0] += values[turn] * weights[turn]
        add_all(some[0], products, total, member, thread)
        if T.And(member == 0, thread == 0):
            logits[0, expert] = logit(expert, total[0])
        for turn in T.unroll(turns):
            if (turn * members + member) % experts == expert:
                quantize(
                    values[turn],
                    T.int64(0),
                    turn * members + member,
                    thread,
                    kept,
                    largest,
                    scale,
                    whole,
                )

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for expert in T.thread_binding(T.int64(experts), thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                for thread in T.thread_binding(T.int64(BLOCK), thread="threadIdx.x"):
                    route(expert, member, thread)

    return Schedule(function.with_body(body.body))
