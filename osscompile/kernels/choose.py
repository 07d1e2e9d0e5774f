"""Choose the next token of every row where the logits are: the most probable, or one drawn from
their softmax.

Adding a random number of Gumbel's distribution to every logit and taking the greatest sum draws
from the softmax. Every kernel narrows the candidates down: a `task` looks at every `parts`-th one
of a row, so that neighbouring tasks read neighbouring numbers. A logit that is not finite wins, and
so shows, unless it is -inf.

Scores are whole numbers, ordered as the floats are, so that compilers that assume all floats are
finite (Metal's, as TVM calls it) do not change which wins.

Several arguments come with every choice; what they hold, `runtime/chooser.py` says: options
[rows, OPTIONS] and mask_rows [rows] int32, logits [rows, vocab] float32, masks [mask rows, words]
uint32, and limits [row limit, 2] float32.
"""

from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.chooser import HIGH, LOW, OPTIONS, SCALE, mask_words
from ..runtime.constraint import MASK_BITS
from ..schedules.formats import const, ordered_bits

ROWS = tirx.Var("choice_rows", "int64")  # of which a token is chosen
CHANGES = tirx.Var("changes", "int64")  # of logits
HIDDEN = -0x7FFFFFFF  # the score of what must not be chosen: below the bits of any number
SPOILED = 0x7FFFFFFF  # the score of what is no number: beyond them
_INFINITY, _MINUS_INFINITY = 0x7F800000, -0x800000  # their bits


@cache
def draw(vocab: int, parts: int, most_rows: int, is_greedy: bool = False) -> PrimFunc:
    """Find each part's greatest score and its id; among equal scores the lowest id wins. Greedy:
    scores are those of the logits, whatever the options say.

    options, mask_rows, logits, masks, limits -> scores and ids [rows, parts] int32 each.
    """

    def score_of(
        options: Buffer,
        mask_rows: Buffer,
        logits: Buffer,
        masks: Buffer,
        limits: Buffer,
        row: Expr,
        token: Expr,
    ) -> Expr:
        logit, scale = logits[row, token], options[row, SCALE]
        score = ordered_bits(logit)
        if not is_greedy:
            drawn = logit * tirx.reinterpret("float32", scale)
            drawn = drawn + gumbel(options[row, LOW], options[row, HIGH], token)
            score = tirx.Select(scale == const(0, "int32"), score, ordered_bits(drawn))
        score = tirx.Select(within(limits, row, logit, token), score, const(HIDDEN, "int32"))
        return checked_score(score, logit, masks, mask_rows[row], token)

    @T.prim_func(private=True, s_tir=True)
    def draw(
        options: T.Buffer((ROWS, T.int64(OPTIONS)), "int32"),
        mask_rows: T.Buffer((ROWS,), "int32"),
        logits: T.Buffer((ROWS, T.int64(vocab)), "float32"),
        masks: T.Buffer((T.int64(most_rows + 1), T.int64(mask_words(vocab))), "uint32"),
        limits: T.Buffer((T.int64(most_rows), T.int64(2)), "float32"),
        scores: T.Buffer((ROWS, T.int64(parts)), "int32"),
        ids: T.Buffer((ROWS, T.int64(parts)), "int32"),
    ) -> None:
        T.func_attr({"op": "best" if is_greedy else "draw", "tirx.noalias": True})
        for task in range(ROWS * parts):
            score = T.alloc_buffer((1,), "int32", scope="local")
            scores[task // parts, task % parts] = score_of(
                options, mask_rows, logits, masks, limits, task // parts, task % parts
            )
            ids[task // parts, task % parts] = T.Cast("int32", task % parts)
            for step in range(T.int64((vocab - 1) // parts)):
                if (step + 1) * parts + task % parts < vocab:
                    score[0] = score_of(
                        options,
                        mask_rows,
                        logits,
                        masks,
                        limits,
                        task // parts,
                        (step + 1) * parts + task % parts,
                    )
                    if score[0] > scores[task // parts, task % parts]:
                        scores[task // parts, task % parts] = score[0]
                        ids[task // parts, task % parts] = T.Cast(
                            "int32", (step + 1) * parts + task % parts
                        )

    return draw


@cache
def narrow(count: int, parts: int) -> PrimFunc:
    """scores and ids [rows, count] -> each part's greatest score and its id [rows, parts]."""

    @T.prim_func(private=True, s_tir=True)
    def narrow(
        scores: T.Buffer((ROWS, T.int64(count)), "int32"),
        ids: T.Buffer((ROWS, T.int64(count)), "int32"),
        best_scores: T.Buffer((ROWS, T.int64(parts)), "int32"),
        best_ids: T.Buffer((ROWS, T.int64(parts)), "int32"),
    ) -> None:
        T.func_attr({"op": "narrow", "tirx.noalias": True})
        for task in range(ROWS * parts):
            best_scores[task // parts, task % parts] = scores[task // parts, task % parts]
            best_ids[task // parts, task % parts] = ids[task // parts, task % parts]
            for step in range(T.int64((count - 1) // parts)):
                if (step + 1) * parts + task % parts < count:
                    if better(
                        scores[task // parts, (step + 1) * parts + task % parts],
                        ids[task // parts, (step + 1) * parts + task % parts],
                        best_scores[task // parts, task % parts],
                        best_ids[task // parts, task % parts],
                    ):
                        best_scores[task // parts, task % parts] = scores[
                            task // parts, (step + 1) * parts + task % parts
                        ]
                        best_ids[task // parts, task % parts] = ids[
                            task // parts, (step + 1) * parts + task % parts
                        ]

    return narrow


@cache
def choice(vocab: int) -> PrimFunc:
    """scores and ids [rows, 1] int32 of what is left, and logits -> the id and its logit, both
    float32, [rows, 2]. A logit that is not finite won because it is no number; an id of -1 means
    that there was nothing to choose from."""

    @T.prim_func(private=True, s_tir=True)
    def choice(
        scores: T.Buffer((ROWS, T.int64(1)), "int32"),
        ids: T.Buffer((ROWS, T.int64(1)), "int32"),
        logits: T.Buffer((ROWS, T.int64(vocab)), "float32"),
        chosen: T.Buffer((ROWS, T.int64(2)), "float32"),
    ) -> None:
        T.func_attr({"op": "choice", "tirx.noalias": True})
        for task in range(ROWS):
            chosen[task, 0] = T.Cast("float32", ids[task, 0])
            chosen[task, 1] = logits[task, ids[task, 0]]
            if scores[task, 0] == HIDDEN:
                chosen[task, 0] = T.float32(-1)

    return choice


@cache
def take_logits(vocab: int) -> PrimFunc:
    """places [changes] int32, of logits as if these were one row -> [changes, 1] float32."""

    @T.prim_func(private=True, s_tir=True)
    def take(
        places: T.Buffer((CHANGES,), "int32"),
        logits: T.Buffer((ROWS, T.int64(vocab)), "float32"),
        taken: T.Buffer((CHANGES, T.int64(1)), "float32"),
    ) -> None:
        T.func_attr({"op": "take_logits", "tirx.noalias": True})
        for task in range(CHANGES):
            taken[task, 0] = logits[places[task] // vocab, places[task] % vocab]

    return take


@cache
def change_logits(vocab: int) -> PrimFunc:
    """Add amounts [changes], the bits of float32, to the logits at places [changes], both int32, of
    which no two are the same."""

    @T.prim_func(private=True, s_tir=True)
    def change(
        logits: T.Buffer((ROWS, T.int64(vocab)), "float32"),
        places: T.Buffer((CHANGES,), "int32"),
        amounts: T.Buffer((CHANGES,), "int32"),
    ) -> None:
        T.func_attr({"op": "change_logits", "tirx.noalias": True})
        for task in range(CHANGES):
            logits[places[task] // vocab, places[task] % vocab] = logits[
                places[task] // vocab, places[task] % vocab
            ] + T.reinterpret("float32", amounts[task])

    return change


def checked_score(score: Expr, logit: Expr, masks: Buffer, mask_row: Expr, token: Expr) -> Expr:
    """Return the score of a logit, HIDDEN where the token must not be chosen, or SPOILED where the
    logit is no number, which must not be lost."""
    bits = tirx.reinterpret("int32", logit)
    minus_infinity = const(_MINUS_INFINITY, "int32")
    is_number = tirx.any(
        (bits & const(0x7FFFFFFF, "int32")) < const(_INFINITY, "int32"), bits == minus_infinity
    )
    bit = (token % MASK_BITS).astype("uint32")
    is_allowed = (masks[mask_row, token // MASK_BITS] >> bit) & const(1, "uint32")
    hidden = tirx.any(is_allowed == const(0, "uint32"), bits == minus_infinity)
    score = tirx.Select(hidden, const(HIDDEN, "int32"), score)
    return tirx.Select(is_number, score, const(SPOILED, "int32"))


def within(limits: Buffer, row: Expr, logit: Expr, token: Expr) -> Expr:
    """Return whether a token is better than the last that may be chosen, or is this one."""
    key, lowest = ordered_bits(logit), ordered_bits(limits[row, 0])
    last = limits[row, 1].astype("int32")
    return tirx.any(key > lowest, tirx.all(key == lowest, token.astype("int32") <= last))


def better(score: Expr, token: Expr, than: Expr, than_token: Expr) -> Expr:
    return T.Or(score > than, T.And(score == than, token < than_token))


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
