"""Schedule gate/up and SwiGLU of one token: a work-group computes 32 neighbouring columns of an
expert's row, and quantises them. A subgroup goes through some of the columns, and loads the weights
of the next one while it multiplies."""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ...targets import Target
from ..formats import BLOCK, const
from ..records import Choose
from ..stages import Load, Stages, always
from .expert_parts import PIECE, PIECES, WORDS, ExpertParts, table_call
from .lanes import LANES, add_lanes
from .launch_before import wait_call
from .of_one_token import SWIGLU_OP
from .quantize_lanes import quantize_lanes
from .room import room_call, rooms
from .top_lanes import num_each, top_lanes

SUBGROUPS = (4, 8, 16)  # in a work-group
SUBGROUPS_WANTED = 8


def swiglu_one(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule `SWIGLU_OP`; declines others."""
    if str(function.attrs["op"]) != SWIGLU_OP:
        return None
    parts, stages = ExpertParts(function), Stages(function)
    xq, (*quantized,) = parts.xq, function.params[-3:]
    bias, logits = function.params[-5:-3]
    top_k, turns, halves = int(quantized[0].shape[0]), parts.turns, parts.halves
    members = choose("subgroups", SUBGROUPS, SUBGROUPS_WANTED)
    room = choose("room", *rooms(members))
    columns, groups = BLOCK // members, parts.columns // BLOCK
    waits = target.has_dependent_launch
    find_top = top_lanes(logits, top_k)
    load, multiply, stage = parts.load(), parts.multiply(), parts.stage(members * LANES)
    quantize = quantize_lanes(stages, "out", tuple(quantized))
    zero = const(0, "int64")

    def column_of(group: Expr, i: Expr, member: Expr) -> Expr:
        return group * BLOCK + i * members + member

    def chosen(ids: Buffer, row: Expr) -> Expr:
        expert = ids[0]
        for k in range(1, top_k):
            expert = T.Select(row == k, ids[k], expert)
        return expert

    def result(row: Expr, column: Expr, both: Buffer, biases: Buffer) -> Expr:
        """Return SwiGLU of the sums and the biases of a column, one of the work-group's."""

        def of(shared: Buffer) -> Load:
            return lambda at: shared[at[1], column % BLOCK]

        loads = {"acc": of(both), "bias": of(biases), "row_expert": always(const(0, "int32"))}
        return stages.value("out", (row, column), loads)

    @T.macro
    def finish(row, group, thread, both, biases):  # type: ignore[no-untyped-def]
        kept = T.alloc_buffer((1,), "float32", scope="local")
        largest = T.alloc_buffer((1,), "uint32", scope="local")
        scales = T.alloc_buffer((1,), "float32", scope="local")
        whole = T.alloc_buffer((1,), "int32", scope="local")
        quantize(
            result(row, group * BLOCK + thread, both, biases),
            row,
            group,
            thread,
            kept,
            largest,
            scales,
            whole,
        )

    @T.macro
    def compute(flat, row, group, member, thread):  # type: ignore[no-untyped-def]
        ids = T.alloc_buffer((top_k,), "int32", scope="local")
        bits = T.alloc_buffer((num_each(logits),), "int32", scope="local")
        best = T.alloc_buffer((1,), "int32", scope="local")
        expert = T.alloc_buffer((1,), "int32", scope="local")
        word = T.alloc_buffer((turns, halves, WORDS), "uint32", scope="local")
        scale = T.alloc_buffer((turns, halves), "uint32", scope="local")
        pieces = T.alloc_buffer((parts.rounds(members * LANES), PIECE), "uint32", scope="local")
        moved = T.alloc_buffer((PIECE,), "uint32", scope="local")
        staged = T.alloc_buffer((1, PIECES, parts.blocks, PIECE), "uint32", scope="shared")
        factor = T.alloc_buffer((turns,), "float32", scope="local")
        x = T.alloc_buffer((PIECES, PIECE), "uint32", scope="local")
        total = T.alloc_buffer((2,), "int32", scope="local")
        table = T.alloc_buffer((1,), "uint32", scope="local")
        sums = T.alloc_buffer((halves,), "float32", scope="local")
        both = T.alloc_buffer((halves, BLOCK), "float32", scope="shared")
        T.evaluate(room_call(room))
        table[0] = table_call()
        biases = T.alloc_buffer((halves, BLOCK), "float32", scope="shared")
        if waits:
            T.evaluate(wait_call())
        find_top(ids, bits, best, thread)
        expert[0] = chosen(ids, row)
        for turn in T.unroll(turns):
            load(word, scale, turn, expert[0], column_of(group, zero, member), turn, thread)
        if member < halves:
            biases[member, thread] = bias[expert[0], member, group * BLOCK + thread]
        stage(staged, flat, pieces, moved, member * LANES + thread)
        for turn in T.unroll(turns):
            factor[turn] = parts.factor(zero, turn, thread)
        for i in T.unroll(columns):
            for half in T.unroll(halves):
                sums[half] = T.float32(0)
            for turn in T.unroll(turns):
                multiply(
                    sums,
                    total,
                    x,
                    word,
                    scale,
                    turn,
                    staged,
                    zero,
                    turn,
                    thread,
                    factor[turn],
                    table[0],
                )
                if i + 1 < columns:
                    load(
                        word,
                        scale,
                        turn,
                        expert[0],
                        column_of(group, i + 1, member),
                        turn,
                        thread,
                    )
            for half in T.unroll(halves):
                add_lanes(sums[half], sums, half)
                if thread == 0:
                    both[half, i * members + member] = sums[half]
        if member == 0:
            finish(row, group, thread, both, biases)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        flat = T.decl_buffer((parts.blocks * PIECES * PIECE,), "uint32", data=xq.data)
        for group in T.thread_binding(T.int64(top_k * groups), thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                for thread in T.thread_binding(T.int64(LANES), thread="threadIdx.x"):
                    compute(flat, group // groups, group % groups, member, thread)

    return Schedule(function.with_body(body.body))
