"""Choose the next token where the logits are: the most probable, or one drawn from their softmax.

Adding a random number of Gumbel's distribution to every logit and taking the greatest sum draws
from the softmax. Every kernel narrows the candidates down: a `task` looks at every `parts`-th one,
so that neighbouring tasks read neighbouring numbers. A logit that is NaN wins, and so shows.

Scores are whole numbers, ordered as the floats are, so that compilers that assume all floats are
finite (Metal's, as TVM calls it) do not change which wins.
"""

from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..schedules.formats import const
from .experts import ordered_bits

_INFINITY = 0x7F800000  # its bits; greater bits, without the sign, are NaN
_MOST = 0x7FFFFFFF  # beyond the bits of any number, positive or negative


@cache
def draw(vocab: int, parts: int) -> PrimFunc:
    """Find each part's greatest score and its id; among equal scores the lowest id wins.

    options [3] int32: the bits of the float32 1 / temperature, or 0 for the most probable token;
    then 64 random bits. logits [1, vocab] float32. mask [vocab] float32: 0, or -inf for a token
    that must not be chosen -> scores and ids [parts] int32 each.
    """

    def score_of(options: Buffer, logits: Buffer, mask: Buffer, token: Expr) -> Expr:
        logit = logits[0, token]
        scaled = logit * tirx.reinterpret("float32", options[0])
        drawn = scaled + gumbel(options[1], options[2], token)
        score = ordered_bits(tirx.Select(options[0] == const(0, "int32"), logit, drawn))
        may_be = tirx.reinterpret("int32", mask[token]) == const(0, "int32")
        magnitude = tirx.reinterpret("int32", logit) & const(0x7FFFFFFF, "int32")
        is_number = magnitude <= const(_INFINITY, "int32")
        allowed = tirx.Select(may_be, score, const(-_MOST, "int32"))
        return tirx.Select(is_number, allowed, const(_MOST, "int32"))

    @T.prim_func(private=True, s_tir=True)
    def draw(
        options: T.Buffer((T.int64(3),), "int32"),
        logits: T.Buffer((T.int64(1), T.int64(vocab)), "float32"),
        mask: T.Buffer((T.int64(vocab),), "float32"),
        scores: T.Buffer((T.int64(parts),), "int32"),
        ids: T.Buffer((T.int64(parts),), "int32"),
    ) -> None:
        T.func_attr({"op": "draw", "tirx.noalias": True})
        for task in range(T.int64(parts)):
            score = T.alloc_buffer((1,), "int32", scope="local")
            scores[task] = score_of(options, logits, mask, task)
            ids[task] = T.Cast("int32", task)
            for step in range(T.int64((vocab - 1) // parts)):
                if (step + 1) * parts + task < vocab:
                    score[0] = score_of(options, logits, mask, (step + 1) * parts + task)
                    if score[0] > scores[task]:
                        scores[task] = score[0]
                        ids[task] = T.Cast("int32", (step + 1) * parts + task)

    return draw


@cache
def narrow(count: int, parts: int) -> PrimFunc:
    """scores and ids [count] -> each part's greatest score and its id [parts]."""

    @T.prim_func(private=True, s_tir=True)
    def narrow(
        scores: T.Buffer((T.int64(count),), "int32"),
        ids: T.Buffer((T.int64(count),), "int32"),
        best_scores: T.Buffer((T.int64(parts),), "int32"),
        best_ids: T.Buffer((T.int64(parts),), "int32"),
    ) -> None:
        T.func_attr({"op": "narrow", "tirx.noalias": True})
        for task in range(T.int64(parts)):
            best_scores[task] = scores[task]
            best_ids[task] = ids[task]
            for step in range(T.int64((count - 1) // parts)):
                if (step + 1) * parts + task < count:
                    if _better(
                        scores[(step + 1) * parts + task],
                        ids[(step + 1) * parts + task],
                        best_scores[task],
                        best_ids[task],
                    ):
                        best_scores[task] = scores[(step + 1) * parts + task]
                        best_ids[task] = ids[(step + 1) * parts + task]

    return narrow


@cache
def choice(vocab: int) -> PrimFunc:
    """ids [1] int32, the one that is left, and logits [1, vocab] -> the id and its logit, both
    float32, [1, 2]. A logit that is not finite means that none was better."""

    @T.prim_func(private=True, s_tir=True)
    def choice(
        ids: T.Buffer((T.int64(1),), "int32"),
        logits: T.Buffer((T.int64(1), T.int64(vocab)), "float32"),
        chosen: T.Buffer((T.int64(1), T.int64(2)), "float32"),
    ) -> None:
        T.func_attr({"op": "choice", "tirx.noalias": True})
        for task in range(T.int64(1)):
            chosen[0, 0] = T.Cast("float32", ids[task])
            chosen[0, 1] = logits[0, ids[task]]

    return choice


def gumbel(low: Expr, high: Expr, token: Expr) -> Expr:
    """Return a number of Gumbel's distribution, float32, for a token and 2 x 32 random bits."""
    mixed = _mix(_mix(token.astype("uint32") + low.astype("uint32")) + high.astype("uint32"))
    uniform = (mixed.astype("float32") + const(0.5, "float32")) * const(2.0**-32, "float32")
    one = const(1.0, "float32")
    # -log(1 - uniform) by its series, also exact where 1 - uniform is not
    series = uniform * (
        one + uniform * (const(1 / 2, "float32") + uniform * const(1 / 3, "float32"))
    )
    small = uniform < const(0.01, "float32")
    exponential = tirx.Select(small, series, -tirx.log(one - uniform))
    return -tirx.log(exponential)


def _mix(x: Expr) -> Expr:
    """Permute 32-bit numbers so that every bit depends on all (C. Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> const(shift, "uint32"))) * const(factor, "uint32")
    return x ^ (x >> const(16, "uint32"))


def _better(score: Expr, token: Expr, than: Expr, than_token: Expr) -> Expr:
    return T.Or(score > than, T.And(score == than, token < than_token))
