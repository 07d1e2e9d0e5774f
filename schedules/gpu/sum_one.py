"""Schedule down, the weighted sum and the residual of one token: a subgroup computes a column, of
all experts one after the other. The experts are known before the launch before has ended, and so
the weights of some are loaded while it still runs."""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ...targets import Target
from ..formats import const
from ..product import whole_parts
from ..records import Choose
from ..stages import Load, Stages, always
from .expert_parts import PIECE, PIECES, WORDS, ExpertParts, table_call
from .lanes import LANES, add_lanes
from .launch_before import wait_call
from .of_one_token import SUM_OP
from .room import room_call, rooms
from .top_lanes import num_each, top_lanes

COLUMNS_TOGETHER = (4, 8, 16)  # one for each subgroup of a work-group
COLUMNS_WANTED = 8
AHEAD = (1, 2, 4)  # experts whose weights are loaded before they are needed
AHEAD_WANTED = 2


def sum_one(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule `SUM_OP`; declines others."""
    if str(function.attrs["op"]) != SUM_OP:
        return None
    parts, stages = ExpertParts(function), Stages(function)
    xq, (logits, residual, sums_of) = parts.xq, function.params[-3:]
    top_k, turns = parts.rows, parts.turns
    together = choose(
        "columns_together", *whole_parts(parts.columns, COLUMNS_TOGETHER, COLUMNS_WANTED)
    )
    room = choose("room", *rooms(together))
    ahead = min(choose("experts_ahead", AHEAD, AHEAD_WANTED), top_k)
    waits = target.has_dependent_launch
    find_top = top_lanes(logits, top_k)
    load, multiply, stage = parts.load(), parts.multiply(), parts.stage(together * LANES)
    width = turns * LANES  # of a row's blocks, and some that are none
    zero, nothing = const(0, "int64"), const(0, "float32")

    def power(ids: Buffer, k: Expr) -> Expr:
        known: Load = lambda at: ids[at[1]]  # noqa: E731
        return stages.value("powers", (zero, k), {"ids": known})

    def share(powers: Buffer, k: Expr) -> Expr:
        """Return the weight of an expert."""
        total = powers[0]
        for i in range(1, top_k):
            total = total + powers[i]
        known: Load = lambda at: powers[at[1]]  # noqa: E731
        return stages.value("weights", (zero, k), {"powers": known, "total": always(total)})

    def begin(column: Expr, thread: Expr, ids: Buffer, shares: Buffer) -> Expr:
        """Return what a thread begins its sum with: one has the residual, and the first ones have
        an expert's weighted bias each."""
        expert, weight = _element(ids, thread), _element(shares, thread)
        loads = {"acc": always(nothing), "row_expert": always(expert)}
        bias = stages.value("out", (thread, column), loads)
        return T.Select(thread < top_k, bias * weight, nothing) + T.Select(
            thread == 0, residual[0, column], nothing
        )

    def factor(number: Expr, shares: Buffer) -> Expr:
        """Return what products with the number-th block are multiplied by."""
        row, place = number // width, number % width
        return parts.factor(row, place // LANES, place % LANES) * _element(shares, row)

    @T.macro
    def weigh(ids, powers, shares):  # type: ignore[no-untyped-def]
        for k in T.unroll(top_k):
            powers[k] = power(ids, k)
        for k in T.unroll(top_k):
            shares[k] = share(powers, k)

    @T.macro
    def compute(flat, column, member, thread):  # type: ignore[no-untyped-def]
        ids = T.alloc_buffer((top_k,), "int32", scope="local")
        bits = T.alloc_buffer((num_each(logits),), "int32", scope="local")
        best = T.alloc_buffer((1,), "int32", scope="local")
        powers = T.alloc_buffer((top_k,), "float32", scope="local")
        shares = T.alloc_buffer((top_k,), "float32", scope="local")
        word = T.alloc_buffer((ahead * turns, 1, WORDS), "uint32", scope="local")
        scale = T.alloc_buffer((ahead * turns, 1), "uint32", scope="local")
        pieces = T.alloc_buffer((parts.rounds(together * LANES), PIECE), "uint32", scope="local")
        moved = T.alloc_buffer((PIECE,), "uint32", scope="local")
        staged = T.alloc_buffer((top_k, PIECES, parts.blocks, PIECE), "uint32", scope="shared")
        x = T.alloc_buffer((PIECES, PIECE), "uint32", scope="local")
        total = T.alloc_buffer((2,), "int32", scope="local")
        table = T.alloc_buffer((1,), "uint32", scope="local")
        sums = T.alloc_buffer((1,), "float32", scope="local")
        factors = T.alloc_buffer((top_k, width), "float32", scope="shared")
        T.evaluate(room_call(room))
        table[0] = table_call()
        find_top(ids, bits, best, thread)
        for k in T.unroll(ahead):
            for turn in T.unroll(turns):
                load(word, scale, k * turns + turn, ids[k], column, turn, thread)
        weigh(ids, powers, shares)
        sums[0] = begin(column, thread, ids, shares)
        if waits:
            T.evaluate(wait_call())
        for i in T.unroll(-(-top_k * width // (together * LANES))):
            if (i * together + member) * LANES + thread < top_k * width:
                factors[
                    ((i * together + member) * LANES + thread) // width,
                    ((i * together + member) * LANES + thread) % width,
                ] = factor((i * together + member) * LANES + thread, shares)
        stage(staged, flat, pieces, moved, member * LANES + thread)
        for k in T.unroll(top_k):
            for turn in T.unroll(turns):
                multiply(
                    sums,
                    total,
                    x,
                    word,
                    scale,
                    k % ahead * turns + turn,
                    staged,
                    k,
                    turn,
                    thread,
                    factors[k, turn * LANES + thread],
                    table[0],
                )
                if k + ahead < top_k:
                    load(
                        word,
                        scale,
                        k % ahead * turns + turn,
                        ids[k + ahead],
                        column,
                        turn,
                        thread,
                    )
        add_lanes(sums[0], sums, 0)
        if thread == 0:
            sums_of[0, column] = sums[0]

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        flat = T.decl_buffer((top_k * parts.blocks * PIECES * PIECE,), "uint32", data=xq.data)
        for group in T.thread_binding(T.int64(parts.columns // together), thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(together), thread="threadIdx.y"):
                for thread in T.thread_binding(T.int64(LANES), thread="threadIdx.x"):
                    compute(flat, group * together + member, member, thread)

    return Schedule(function.with_body(body.body))


def _element(values: Buffer, number: Expr) -> Expr:
    """Return an element, for numbers past the last that; values stay in registers."""
    value = values[int(values.shape[0]) - 1]
    for k in reversed(range(int(values.shape[0]) - 1)):
        value = T.Select(number == k, values[k], value)
    return value
