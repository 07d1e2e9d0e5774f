"""Schedule what narrows the candidates for a token down: a subgroup finds the best of a part, of
which its threads look at some each."""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ...targets import Target
from ..formats import const
from ..records import Choose
from .lanes import LANES
from .top_lanes import GREATEST, LEAST

_NOBODY = (1 << 31) - 1


def narrow(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule `narrow`; declines others."""
    if str(function.attrs["op"]) != "narrow" or not target.has_shuffles:
        return None
    scores, ids, best_scores, best_ids = function.params
    num_rows, count, parts = scores.shape[0], int(scores.shape[1]), int(best_scores.shape[1])
    each = -(-count // (parts * LANES))

    def candidate(part: Expr, i: Expr, thread: Expr) -> Expr:
        """Return the place of a thread's i-th candidate; beyond the last it repeats the first."""
        place = (i * LANES + thread) * parts + part
        return T.Select(place < count, place, part)

    def better(score: Buffer, token: Buffer, i: Expr, best: Buffer) -> Expr:
        wins = T.And(score[i] == best[0], token[i] < best[1])
        return T.Or(score[i] > best[0], wins)

    @T.macro
    def find(row, part, thread):  # type: ignore[no-untyped-def]
        score = T.alloc_buffer((each,), "int32", scope="local")
        token = T.alloc_buffer((each,), "int32", scope="local")
        best = T.alloc_buffer((2,), "int32", scope="local")
        greatest = T.alloc_buffer((1,), "int32", scope="local")
        least = T.alloc_buffer((1,), "int32", scope="local")
        for i in T.unroll(each):
            score[i] = scores[row, candidate(part, i, thread)]
            token[i] = ids[row, candidate(part, i, thread)]
        best[0] = score[0]
        best[1] = token[0]
        for i in T.unroll(each - 1):
            if better(score, token, i + 1, best):
                best[0] = score[i + 1]
                best[1] = token[i + 1]
        greatest[0] = T.call_extern("int32", GREATEST, best[0])
        least[0] = T.Select(best[0] == greatest[0], best[1], const(_NOBODY, "int32"))
        least[0] = T.call_extern("int32", LEAST, least[0])
        if thread == 0:
            best_scores[row, part] = greatest[0]
            best_ids[row, part] = least[0]

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for group in T.thread_binding(num_rows * parts, thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(LANES), thread="threadIdx.x"):
                find(group // parts, group % parts, thread)

    return Schedule(function.with_body(body.body))
