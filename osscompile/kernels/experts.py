"""Routing: the experts that a token goes to, and the rows that each expert serves.

Loops are named as in `attention.py`: the iterations of `task` are independent.
"""

from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..schedules.formats import Index, const, extent


def chosen(logits: te.Tensor, top_k: int) -> list[te.Tensor]:
    """Rank the experts of every token, and choose the top_k.

    logits [tokens, experts] float32 -> tensors of these names: places [tokens, experts] int32, each
    expert's place by logit, the best first, ties to the lower id; ids [tokens, top_k] int32; and
    weights [tokens, top_k] float32, the softmax of the chosen.

    Logits are compared by their bits, so that NaN has a place too.
    """
    tokens, experts = logits.shape
    top = (tokens, extent(top_k))
    e = te.reduce_axis((extent(0), experts), name="e")
    k = te.reduce_axis((extent(0), extent(top_k)), name="k")

    def before(i: Expr, other: Expr, expert: Expr) -> Expr:
        theirs, ours = (ordered_bits(logits[i, x]) for x in (other, expert))
        tie = tirx.all(theirs == ours, other < expert)
        return tirx.any(theirs > ours, tie).astype("int32")

    places = te.compute(
        (tokens, experts), lambda i, r: te.sum(before(i, e, r), axis=e), name="places"
    )
    ids = te.compute(
        top,
        lambda i, j: te.sum(
            tirx.Select(places[i, e] == j.astype("int32"), e.astype("int32"), const(0, "int32")),
            axis=e,
        ),
        name="ids",
    )
    powers = te.compute(
        top, lambda i, j: tirx.exp(logits[i, ids[i, j]] - logits[i, ids[i, 0]]), name="powers"
    )
    total = te.compute((tokens,), lambda i: te.sum(powers[i, k], axis=k), name="total")
    weights = te.compute(top, lambda i, j: powers[i, j] / total[i], name="weights")
    return [places, ids, weights]


def ordered_bits(x: Expr) -> Expr:
    """Return int32 in the order of the float32; both zeros give the same."""
    bits = tirx.reinterpret("int32", x)
    magnitude = bits & const(0x7FFFFFFF, "int32")
    return tirx.Select(bits < const(0, "int32"), -magnitude, bits)


@cache
def sort_by_expert(tokens: Index, experts: int, top_k: int) -> PrimFunc:
    """Sort (token, choice) pairs by expert, so that the rows of one expert follow each other.

    ids [tokens, top_k] int32 -> row_expert and row_token [tokens * top_k] int32: expert and token
    of every row; slots [tokens, top_k] int32: the pair's row. Within an expert, rows keep the order
    of the tokens. Every expert looks through all pairs, and so needs no other expert's result.
    """
    num_tokens = extent(tokens)
    num_rows = num_tokens * top_k

    @T.prim_func(private=True, s_tir=True)
    def sort(
        ids: T.Buffer((num_tokens, T.int64(top_k)), "int32"),
        row_expert: T.Buffer((num_rows,), "int32"),
        row_token: T.Buffer((num_rows,), "int32"),
        slots: T.Buffer((num_tokens, T.int64(top_k)), "int32"),
    ) -> None:
        T.func_attr({"op": "sort_by_expert", "tirx.noalias": True})
        for task in range(T.int64(experts)):
            row = T.alloc_buffer((1,), "int32", scope="local")
            row[0] = 0
            for t, k in T.grid(num_tokens, T.int64(top_k)):
                row[0] += T.Cast("int32", ids[t, k] < T.Cast("int32", task))
            for t, k in T.grid(num_tokens, T.int64(top_k)):
                if ids[t, k] == T.Cast("int32", task):
                    slots[t, k] = row[0]
                    row_expert[row[0]] = ids[t, k]
                    row_token[row[0]] = T.Cast("int32", t)
                    row[0] += 1

    return sort
