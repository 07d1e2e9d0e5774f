"""Routing: the experts that a token goes to, and the rows that each expert serves.

Loops are named as in `attention.py`: the iterations of `task` are independent.
"""

from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..schedules.formats import BLOCK, Index, const, extent, ordered_bits


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


@cache
def rows_of_one(top_k: int) -> PrimFunc:
    """What `sort_by_expert` is for, for a single token, whose experts all differ: ids [1, top_k]
    int32 -> row_expert [top_k] and slots [1, top_k] int32, in the order of choice."""
    ids = te.placeholder((extent(1), extent(top_k)), "int32", name="ids")
    row_expert = te.compute((extent(top_k),), lambda i: ids[0, i], name="row_expert")
    slots = te.compute((extent(1), extent(top_k)), lambda i, k: k.astype("int32"), name="slots")
    return te.create_prim_func([ids, row_expert, slots]).with_attr("op", "rows_of_one")


@cache
def repeat_row(top_k: int, inputs: int) -> PrimFunc:
    """The tensors xq, xs and xoffset of one row of int8 activations -> the same of top_k rows."""
    blocks = extent(inputs // BLOCK)
    xq = te.placeholder((extent(1), blocks, extent(BLOCK)), "int8", name="xq")
    xs = te.placeholder((extent(1), blocks), "float32", name="xs")
    xoffset = te.placeholder((extent(1), blocks), "int32", name="xoffset")

    def repeated(tensor: te.Tensor) -> te.Tensor:
        shape = (extent(top_k), *tensor.shape[1:])
        name = f"{tensor.op.name}_row"
        return te.compute(shape, lambda i, *rest: tensor[(0, *rest)], name=name)

    tensors = [xq, xs, xoffset]
    return te.create_prim_func([*tensors, *map(repeated, tensors)]).with_attr("op", "repeat_row")
