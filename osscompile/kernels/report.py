"""Tell of every row what its log-probabilities are made of, and the most probable tokens.

All is of the model's own distribution: only reserved tokens, which the first mask hides, are left
out. Arguments are those of `choose.py`.
"""

from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.chooser import REPORTED, mask_words
from ..schedules.formats import const, extent, ordered_bits
from .choose import HIDDEN, ROWS, better, checked_score
from .limit import num_parts

_NO_ID = 0x7FFFFFFF  # behind all others with the same score
_RESERVED = 0  # the number of the mask that hides nothing else


@T.macro
def _start(best, best_ids):  # type: ignore[no-untyped-def]
    for place in range(T.int64(REPORTED)):
        best[place] = HIDDEN
        best_ids[place] = _NO_ID


@T.macro
def _insert(best, best_ids, score, token):  # type: ignore[no-untyped-def]
    # in place of the last, from where it moves up as long as it is better
    if better(score, token, best[REPORTED - 1], best_ids[REPORTED - 1]):
        best[REPORTED - 1] = score
        best_ids[REPORTED - 1] = token
        for step in range(T.int64(REPORTED - 1)):
            if better(score, token, best[REPORTED - 2 - step], best_ids[REPORTED - 2 - step]):
                best[REPORTED - 1 - step] = best[REPORTED - 2 - step]
                best_ids[REPORTED - 1 - step] = best_ids[REPORTED - 2 - step]
                best[REPORTED - 2 - step] = score
                best_ids[REPORTED - 2 - step] = token


@T.macro
def _keep(best, best_ids, best_scores, ids, row, part):  # type: ignore[no-untyped-def]
    for place in range(T.int64(REPORTED)):
        best_scores[row, part, place] = best[place]
        ids[row, part, place] = best_ids[place]


@cache
def best_logits(vocab: int, parts: int, most_rows: int) -> PrimFunc:
    """logits, masks -> scores and ids of the best of each part of the vocabulary, in order
    [rows, parts, REPORTED] int32; scores are HIDDEN where there are fewer."""

    def score_of(logits: Buffer, masks: Buffer, row: Expr, token: Expr) -> Expr:
        logit = logits[row, token]
        reserved = const(_RESERVED, "int32")
        return checked_score(ordered_bits(logit), logit, masks, reserved, token)

    @T.prim_func(private=True, s_tir=True)
    def best_logits(
        logits: T.Buffer((ROWS, T.int64(vocab)), "float32"),
        masks: T.Buffer((T.int64(most_rows + 1), T.int64(mask_words(vocab))), "uint32"),
        best_scores: T.Buffer((ROWS, T.int64(parts), T.int64(REPORTED)), "int32"),
        best_ids: T.Buffer((ROWS, T.int64(parts), T.int64(REPORTED)), "int32"),
    ) -> None:
        T.func_attr({"op": "best_logits", "tirx.noalias": True})
        for task in range(ROWS * parts):
            best = T.alloc_buffer((REPORTED,), "int32", scope="local")
            ids = T.alloc_buffer((REPORTED,), "int32", scope="local")
            score = T.alloc_buffer((1,), "int32", scope="local")
            _start(best, ids)
            for step in range(T.int64(-(-vocab // parts))):
                if step * parts + task % parts < vocab:
                    score[0] = score_of(logits, masks, task // parts, step * parts + task % parts)
                    _insert(best, ids, score[0], T.Cast("int32", step * parts + task % parts))
            _keep(best, ids, best_scores, best_ids, task // parts, task % parts)

    return best_logits


@cache
def best_of(count: int, parts: int) -> PrimFunc:
    """scores and ids [rows, count, REPORTED] -> those of the best of every `parts`-th list
    [rows, parts, REPORTED]."""

    @T.prim_func(private=True, s_tir=True)
    def best_of(
        scores: T.Buffer((ROWS, T.int64(count), T.int64(REPORTED)), "int32"),
        ids: T.Buffer((ROWS, T.int64(count), T.int64(REPORTED)), "int32"),
        best_scores: T.Buffer((ROWS, T.int64(parts), T.int64(REPORTED)), "int32"),
        best_ids: T.Buffer((ROWS, T.int64(parts), T.int64(REPORTED)), "int32"),
    ) -> None:
        T.func_attr({"op": "best_of", "tirx.noalias": True})
        for task in range(ROWS * parts):
            best = T.alloc_buffer((REPORTED,), "int32", scope="local")
            kept = T.alloc_buffer((REPORTED,), "int32", scope="local")
            _start(best, kept)
            for step, place in T.grid(T.int64(-(-count // parts)), T.int64(REPORTED)):
                if step * parts + task % parts < count:
                    _insert(
                        best,
                        kept,
                        scores[task // parts, step * parts + task % parts, place],
                        ids[task // parts, step * parts + task % parts, place],
                    )
            _keep(best, kept, best_scores, best_ids, task // parts, task % parts)

    return best_of


@cache
def masses(vocab: int, most_rows: int) -> PrimFunc:
    """logits, masks, ids [rows, 1, REPORTED] int32 -> masses [rows, parts] float32: sums of
    e^(logit - that of the first id) over parts of the vocabulary."""
    parts = num_parts(vocab)
    size = -(-vocab // parts)
    logits = te.placeholder((ROWS, extent(vocab)), "float32", name="logits")
    shape = (extent(most_rows + 1), extent(mask_words(vocab)))
    masks = te.placeholder(shape, "uint32", name="masks")
    ids = te.placeholder((ROWS, extent(1), extent(REPORTED)), "int32", name="ids")
    e = te.reduce_axis((extent(0), extent(size)), name="e")
    zero = const(0.0, "float32")

    def mass(row: Expr, token: Expr) -> Expr:
        logit = logits[row, token]
        reserved = const(_RESERVED, "int32")
        score = checked_score(ordered_bits(logit), logit, masks, reserved, token)
        weight = tirx.exp(logit - logits[row, ids[row, 0, 0]])
        return tirx.if_then_else(score != const(HIDDEN, "int32"), weight, zero)

    def term(row: Expr, part: Expr) -> Expr:
        token = part * size + e
        return tirx.if_then_else(token < vocab, mass(row, token), zero)

    out = te.compute(
        (ROWS, extent(parts)), lambda row, part: te.sum(term(row, part), axis=e), name="masses"
    )
    return te.create_prim_func([logits, masks, ids, out]).with_attr("op", "masses")


@cache
def report(vocab: int) -> PrimFunc:
    """scores and ids [rows, 1, REPORTED] int32, logits, masses -> [rows, 2 + 2 REPORTED] float32:
    the highest logit, the sum of e^(logit - it), and then ids and logits, the best first; an id of
    -1 where there are fewer."""
    parts = num_parts(vocab)

    @T.prim_func(private=True, s_tir=True)
    def report(
        scores: T.Buffer((ROWS, T.int64(1), T.int64(REPORTED)), "int32"),
        ids: T.Buffer((ROWS, T.int64(1), T.int64(REPORTED)), "int32"),
        logits: T.Buffer((ROWS, T.int64(vocab)), "float32"),
        masses: T.Buffer((ROWS, T.int64(parts)), "float32"),
        told: T.Buffer((ROWS, T.int64(2 + 2 * REPORTED)), "float32"),
    ) -> None:
        T.func_attr({"op": "tell_report", "tirx.noalias": True})
        for task in range(ROWS):
            told[task, 0] = logits[task, ids[task, 0, 0]]
            told[task, 1] = T.float32(0)
            for part in range(T.int64(parts)):
                told[task, 1] = told[task, 1] + masses[task, part]
            for place in range(T.int64(REPORTED)):
                told[task, 2 + 2 * place] = T.float32(-1)
                told[task, 3 + 2 * place] = T.float32(0)
                if scores[task, 0, place] != HIDDEN:
                    told[task, 2 + 2 * place] = T.Cast("float32", ids[task, 0, place])
                    told[task, 3 + 2 * place] = logits[task, ids[task, 0, place]]

    return report
