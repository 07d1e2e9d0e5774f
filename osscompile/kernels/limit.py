"""Find the last token that may be drawn of every row: the fewest best tokens that are so many, or
whose probabilities come to a share of all; among equal logits the lower ids are better.

The order of tokens is that of a whole number, their `place`: the bits of the logit, and below them
those of the id, turned round. The place that is looked for becomes known digit by digit: `sums`
adds up what tokens count whose place begins with the known digits, by their next one, and `decide`
takes the digit at which enough have come together.

Arguments are those of `choose.py`. state [rows, 4] int32: the logit's and the id's part of the
place so far, the bits of the float32 that is still missing, and how many digits are known.
"""

from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.chooser import COUNT, LEAST, OPTIONS, SCALE, SHARE, mask_words
from ..schedules.formats import const, extent, ordered_bits
from .choose import HIDDEN, ROWS, checked_score, within

DIGIT_BITS = 4
DIGITS = 1 << DIGIT_BITS
_LOWEST = -(1 << 31)  # of the logit's part
_NEVER = 3e38  # more than any sum
_PART = 16384  # tokens of a sum: a work-group's
STATE = 4
_KEY, _ID, _MISSING, _KNOWN = range(STATE)


def num_levels(vocab: int) -> int:
    """Return how many digits a place has."""
    return (32 + _id_bits(vocab)) // DIGIT_BITS


def num_parts(vocab: int) -> int:
    return max(1, vocab // _PART)


@cache
def begin() -> PrimFunc:
    """Nothing -> the state before the first digit."""

    @T.prim_func(private=True, s_tir=True)
    def begin(state: T.Buffer((ROWS, T.int64(STATE)), "int32")) -> None:
        T.func_attr({"op": "limit_begin", "tirx.noalias": True})
        for task in range(ROWS):
            state[task, _KEY] = _LOWEST
            state[task, _ID] = 0
            state[task, _MISSING] = 0
            state[task, _KNOWN] = 0

    return begin


@cache
def sums(vocab: int, most_rows: int) -> PrimFunc:
    """options, mask_rows, logits, masks, limits, ids [rows, 1] int32 of the best tokens, state ->
    sums [rows, parts, DIGITS] float32 of parts of the vocabulary."""
    parts = num_parts(vocab)
    size = -(-vocab // parts)
    options = te.placeholder((ROWS, extent(OPTIONS)), "int32", name="options")
    mask_rows = te.placeholder((ROWS,), "int32", name="mask_rows")
    logits = te.placeholder((ROWS, extent(vocab)), "float32", name="logits")
    shape = (extent(most_rows + 1), extent(mask_words(vocab)))
    masks = te.placeholder(shape, "uint32", name="masks")
    limits = te.placeholder((extent(most_rows), extent(2)), "float32", name="limits")
    ids = te.placeholder((ROWS, extent(1)), "int32", name="ids")
    state = te.placeholder((ROWS, extent(STATE)), "int32", name="state")
    e = te.reduce_axis((extent(0), extent(size)), name="e")

    def counted(row: Expr, token: Expr, digit: Expr) -> Expr:
        logit = logits[row, token]
        score = checked_score(ordered_bits(logit), logit, masks, mask_rows[row], token)
        place, known = _place(score, _reversed(token, vocab), vocab), _known(state, row, vocab)
        shift = _shift(state, row, vocab)
        counts = tirx.all(
            score != const(HIDDEN, "int32"),
            (place ^ known) >> (shift + const(DIGIT_BITS, "int64")) == const(0, "int64"),
            (place >> shift) & const(DIGITS - 1, "int64") == digit,
            within(limits, row, logit, token),
        )
        scale = tirx.reinterpret("float32", options[row, SCALE])
        weight = tirx.exp((logit - logits[row, ids[row, 0]]) * scale)
        by_count = options[row, COUNT] > const(0, "int32")
        amount = tirx.Select(by_count, const(1.0, "float32"), weight)
        return tirx.if_then_else(counts, amount, const(0.0, "float32"))

    def term(row: Expr, part: Expr, digit: Expr) -> Expr:
        token = part * size + e
        zero = const(0.0, "float32")
        return tirx.if_then_else(token < vocab, counted(row, token, digit), zero)

    out = te.compute(
        (ROWS, extent(parts), extent(DIGITS)),
        lambda row, part, digit: te.sum(term(row, part, digit), axis=e),
        name="sums",
    )
    tensors = [options, mask_rows, logits, masks, limits, ids, state, out]
    return te.create_prim_func(tensors).with_attr("op", "limit_sums")


@cache
def decide(vocab: int) -> PrimFunc:
    """options, sums, state -> the state with one more digit: that at which enough have come
    together, or else the last at which there is any."""
    parts = num_parts(vocab)

    def place_with(state: Buffer, row: Expr, digit: Expr) -> Expr:
        return _known(state, row, vocab) | (digit.astype("int64") << _shift(state, row, vocab))

    @T.prim_func(private=True, s_tir=True)
    def decide(
        options: T.Buffer((ROWS, T.int64(OPTIONS)), "int32"),
        sums: T.Buffer((ROWS, T.int64(parts), T.int64(DIGITS)), "float32"),
        state: T.Buffer((ROWS, T.int64(STATE)), "int32"),
        after: T.Buffer((ROWS, T.int64(STATE)), "int32"),
    ) -> None:
        T.func_attr({"op": "limit_decide", "tirx.noalias": True})
        for task in range(ROWS):
            total = T.alloc_buffer((1,), "float32", scope="local")  # up to this digit
            needed = T.alloc_buffer((1,), "float32", scope="local")
            before = T.alloc_buffer((1,), "float32", scope="local")  # the total before the digit
            here = T.alloc_buffer((1,), "float32", scope="local")
            digit = T.alloc_buffer((1,), "int32", scope="local")
            total[0] = T.float32(0)
            for part, step in T.grid(T.int64(parts), T.int64(DIGITS)):
                total[0] += sums[task, part, step]
            needed[0] = T.reinterpret("float32", state[task, _MISSING])
            if state[task, _KNOWN] == 0:
                needed[0] = _wanted(options, task, total[0])
            total[0] = T.float32(0)
            before[0] = T.float32(0)
            digit[0] = 0
            for step in range(T.int64(DIGITS)):
                here[0] = T.float32(0)
                for part in range(T.int64(parts)):
                    here[0] += sums[task, part, DIGITS - 1 - step]
                if T.And(
                    here[0] > T.float32(0), T.Or(total[0] == T.float32(0), total[0] < needed[0])
                ):
                    digit[0] = T.Cast("int32", DIGITS - 1 - step)
                    before[0] = total[0]
                    total[0] += here[0]
            after[task, _KEY] = T.Cast(
                "int32", (place_with(state, task, digit[0]) >> _id_bits(vocab)) + _LOWEST
            )
            after[task, _ID] = T.Cast(
                "int32", place_with(state, task, digit[0]) & ((1 << _id_bits(vocab)) - 1)
            )
            after[task, _MISSING] = T.reinterpret("int32", needed[0] - before[0])
            after[task, _KNOWN] = state[task, _KNOWN] + 1

    return decide


@cache
def finish(vocab: int, most_rows: int) -> PrimFunc:
    """options, logits, ids [rows, 1] int32 of the best tokens, state with all digits -> limits,
    which also leave out what has less than the least share of the best's probability."""

    def least(options: Buffer, best: Expr, row: Expr) -> Expr:
        share = tirx.reinterpret("float32", options[row, LEAST])
        scale = tirx.reinterpret("float32", options[row, SCALE])
        never = const(-_NEVER, "float32")
        return tirx.Select(share > const(0.0, "float32"), best + tirx.log(share) / scale, never)

    def logit_of(key: Expr) -> Expr:
        """Turn `ordered_bits` round."""
        sign = const(_LOWEST, "int32")
        bits = tirx.Select(key < const(0, "int32"), -key | sign, key)
        return tirx.reinterpret("float32", bits)

    @T.prim_func(private=True, s_tir=True)
    def finish(
        options: T.Buffer((ROWS, T.int64(OPTIONS)), "int32"),
        logits: T.Buffer((ROWS, T.int64(vocab)), "float32"),
        ids: T.Buffer((ROWS, T.int64(1)), "int32"),
        state: T.Buffer((ROWS, T.int64(STATE)), "int32"),
        limits: T.Buffer((T.int64(most_rows), T.int64(2)), "float32"),
    ) -> None:
        T.func_attr({"op": "limit_finish", "tirx.noalias": True})
        for task in range(T.int64(most_rows)):
            limits[task, 0] = T.float32(0)
            limits[task, 1] = T.float32(0)
            if task < ROWS:
                limits[task, 0] = logit_of(state[task, _KEY])
                limits[task, 1] = T.Cast(
                    "float32", _reversed(T.Cast("int64", state[task, _ID]), vocab)
                )
                if (
                    ordered_bits(least(options, logits[task, ids[task, 0]], task))
                    > state[task, _KEY]
                ):
                    limits[task, 0] = least(options, logits[task, ids[task, 0]], task)
                    limits[task, 1] = T.float32(vocab)

    return finish


def _wanted(options: Buffer, row: Expr, total: Expr) -> Expr:
    """Return how much of the total is enough: a count, a share, or all."""
    count, share = options[row, COUNT], tirx.reinterpret("float32", options[row, SHARE])
    shared = tirx.Select(share < const(1.0, "float32"), share * total, const(_NEVER, "float32"))
    return tirx.Select(count > const(0, "int32"), count.astype("float32"), shared)


def _id_bits(vocab: int) -> int:
    """Return the bits of an id, in whole digits."""
    return -(-(vocab - 1).bit_length() // DIGIT_BITS) * DIGIT_BITS


def _place(key: Expr, reversed_id: Expr, vocab: int) -> Expr:
    high = key.astype("int64") - const(_LOWEST, "int64")
    return (high << const(_id_bits(vocab), "int64")) | reversed_id


def _known(state: Buffer, row: Expr, vocab: int) -> Expr:
    return _place(state[row, _KEY], state[row, _ID].astype("int64"), vocab)


def _reversed(token: Expr, vocab: int) -> Expr:
    """Turn ids round, so that the lower one is better; and turn them back."""
    return const((1 << _id_bits(vocab)) - 1, "int64") - token


def _shift(state: Buffer, row: Expr, vocab: int) -> Expr:
    """Return where in a place its next digit begins."""
    left = const(num_levels(vocab) - 1, "int64") - state[row, _KNOWN].astype("int64")
    return left * const(DIGIT_BITS, "int64")
