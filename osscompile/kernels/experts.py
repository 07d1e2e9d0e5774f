"""Routing: which experts a token goes to, the rows that each expert serves, and the sum.

Loops are named as in `attention.py`: the iterations of `task` are independent.
"""

from functools import cache

from tvm import te
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..schedules.formats import Index, extent


@cache
def route(tokens: Index, experts: int, top_k: int) -> PrimFunc:
    """logits [tokens, experts] float32 -> the top_k experts of each token [tokens, top_k] int32,
    best first, ties to the lower id; and their softmax [tokens, top_k] float32."""
    num_tokens = extent(tokens)

    @T.prim_func(private=True, s_tir=True)
    def top_experts(
        logits: T.Buffer((num_tokens, T.int64(experts)), "float32"),
        ids: T.Buffer((num_tokens, T.int64(top_k)), "int32"),
        weights: T.Buffer((num_tokens, T.int64(top_k)), "float32"),
    ) -> None:
        T.func_attr({"op": "route", "tirx.noalias": True})
        for task in range(num_tokens):
            total = T.alloc_buffer((1,), "float32", scope="local")
            taken = T.alloc_buffer((1,), "int32", scope="local")
            best = T.alloc_buffer((1,), "int32", scope="local")
            for k in range(T.int64(top_k)):
                best[0] = -1
                for e in range(T.int64(experts)):
                    taken[0] = 0
                    for earlier in range(k):
                        if ids[task, earlier] == T.Cast("int32", e):
                            taken[0] = 1
                    if taken[0] == 0:
                        if best[0] < 0:
                            best[0] = T.Cast("int32", e)
                        else:
                            if logits[task, e] > logits[task, best[0]]:
                                best[0] = T.Cast("int32", e)
                ids[task, k] = best[0]
            total[0] = T.float32(0.0)
            for k in range(T.int64(top_k)):
                weights[task, k] = T.exp(logits[task, ids[task, k]] - logits[task, ids[task, 0]])
                total[0] += weights[task, k]
            for k in range(T.int64(top_k)):
                weights[task, k] = weights[task, k] / total[0]

    return top_experts


@cache
def sort_by_expert(tokens: Index, experts: int, top_k: int) -> PrimFunc:
    """Sort (token, choice) pairs by expert, so that the rows of one expert follow each other.

    ids [tokens, top_k] int32 -> row_expert and row_token [tokens * top_k] int32: expert and token
    of every row; slots [tokens, top_k] int32: the pair's row; and counters [experts] int32 that
    nobody reads. Within an expert, rows keep the order of the tokens.
    """
    num_tokens = extent(tokens)
    num_rows = num_tokens * top_k

    @T.prim_func(private=True, s_tir=True)
    def sort(
        ids: T.Buffer((num_tokens, T.int64(top_k)), "int32"),
        row_expert: T.Buffer((num_rows,), "int32"),
        row_token: T.Buffer((num_rows,), "int32"),
        slots: T.Buffer((num_tokens, T.int64(top_k)), "int32"),
        counters: T.Buffer((T.int64(experts),), "int32"),
    ) -> None:
        T.func_attr({"op": "sort_by_expert", "tirx.noalias": True})
        before = T.alloc_buffer((2,), "int32", scope="local")
        for e in range(T.int64(experts)):
            counters[e] = 0
        for t, k in T.grid(num_tokens, T.int64(top_k)):
            counters[ids[t, k]] += 1
        before[0] = 0
        for e in range(T.int64(experts)):  # from counts to first rows
            before[1] = before[0] + counters[e]
            counters[e] = before[0]
            before[0] = before[1]
        for t, k in T.grid(num_tokens, T.int64(top_k)):
            slots[t, k] = counters[ids[t, k]]
            counters[ids[t, k]] += 1
            row_expert[slots[t, k]] = ids[t, k]
            row_token[slots[t, k]] = T.Cast("int32", t)

    return sort


@cache
def combine_experts(tokens: Index, hidden: int, expert_rows: Index, top_k: int) -> PrimFunc:
    """Expert outputs [expert_rows, hidden] float32, slots [tokens, top_k] int32, weights [tokens,
    top_k], residual [tokens, hidden] float32 -> residual + the weighted sum of each token's experts
    [tokens, hidden]."""
    shape = (extent(tokens), extent(hidden))
    y = te.placeholder((extent(expert_rows), extent(hidden)), "float32", name="y")
    choices = (extent(tokens), extent(top_k))
    slots = te.placeholder(choices, "int32", name="slots")
    weights = te.placeholder(choices, "float32", name="weights")
    residual = te.placeholder(shape, "float32", name="residual")

    def total(i: Expr, h: Expr) -> Expr:
        sum_of = residual[i, h]
        for k in range(top_k):
            sum_of = sum_of + y[slots[i, k], h] * weights[i, k]
        return sum_of

    out = te.compute(shape, total, name="out")
    function = te.create_prim_func([y, slots, weights, residual, out])
    return function.with_attr("op", "combine_experts")
