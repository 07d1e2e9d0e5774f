"""Schedule the sorting of rows by expert: a work-group finds the rows of one expert.

Its threads share out the tokens, each taking several that follow each other. A thread counts its
pairs of this expert, and those of experts before it. Sums over the threads then say where the
expert's rows begin, and where the thread's.
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ...targets import Target
from ..formats import is_few
from ..records import Choose
from .lanes import LANES, add_lanes, add_lanes_before


def sort(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule `sort_by_expert` for any number of tokens; declines others, and one token."""
    if str(function.attrs["op"]) != "sort_by_expert" or not target.has_shuffles:
        return None
    ids, row_expert, row_token, slots = function.params
    num_tokens, top_k = ids.shape[0], int(ids.shape[1])
    if isinstance(num_tokens, tirx.IntImm) or is_few(num_tokens):
        return None
    experts = function.body.extent  # of the loop `task`
    members = min(target.max_threads // LANES, LANES)
    each = tirx.ceildiv(num_tokens, T.int64(members * LANES))
    is_vector = top_k in (2, 4)

    def chosen(token: Expr) -> Expr:
        return ids.vload([token, T.int64(0)], f"int32x{top_k}")

    @T.macro
    def load(pair, token):  # type: ignore[no-untyped-def]
        if is_vector:
            pair[0:top_k] = chosen(token)
        else:
            for k in T.unroll(top_k):
                pair[k] = ids[token, k]

    @T.macro
    def count(own, earlier, pair, first, expert):  # type: ignore[no-untyped-def]
        for i in range(each):
            if first + i < num_tokens:
                load(pair, first + i)
                for k in T.unroll(top_k):
                    own[0] += T.Cast("int32", pair[k] == expert)
                    earlier[0] += T.Cast("int32", pair[k] < expert)

    @T.macro
    def place(row, pair, first, expert):  # type: ignore[no-untyped-def]
        for i in range(each):
            if first + i < num_tokens:
                load(pair, first + i)
                for k in T.unroll(top_k):
                    if pair[k] == expert:
                        slots[first + i, k] = row[0]
                        row_expert[row[0]] = expert
                        row_token[row[0]] = T.Cast("int32", first + i)
                        row[0] += 1

    def of_lane(numbers: Buffer, lane: Expr) -> Expr:
        """Return the number of the member that a lane stands for, or 0."""
        return T.Select(lane < members, numbers[T.min(lane, members - 1)], 0)

    @T.macro
    def find(expert, member, lane):  # type: ignore[no-untyped-def]
        pair = T.alloc_buffer((top_k,), "int32", scope="local")
        own = T.alloc_buffer((1,), "int32", scope="local")
        earlier = T.alloc_buffer((1,), "int32", scope="local")
        row = T.alloc_buffer((1,), "int32", scope="local")
        some = T.alloc_buffer((1,), "int32", scope="local")
        all_own = T.alloc_buffer((members,), "int32", scope="shared")
        all_earlier = T.alloc_buffer((members,), "int32", scope="shared")
        own[0] = 0
        earlier[0] = 0
        count(own, earlier, pair, (member * LANES + lane) * each, expert)
        add_lanes_before(own, row, lane)
        add_lanes(earlier[0], earlier, 0)
        if lane == 0:
            all_own[member] = own[0]
            all_earlier[member] = earlier[0]
        some[0] = of_lane(all_earlier, lane) + T.Select(lane < member, of_lane(all_own, lane), 0)
        add_lanes(some[0], some, 0)
        row[0] += some[0]
        place(row, pair, (member * LANES + lane) * each, expert)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for expert in T.thread_binding(experts, thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                for lane in T.thread_binding(T.int64(LANES), thread="threadIdx.x"):
                    find(T.Cast("int32", expert), member, lane)

    return Schedule(function.with_body(body.body))
