"""Multiply the row of one token by rows of its experts' weights: a subgroup computes a sum, and its
threads take blocks of 32 inputs by turns.

A byte is looked up for each code: twice a weight's magnitude where it is positive, and again where
it is negative; else 0. So a block's sum is one sum of products less another.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ...targets import Target
from ..formats import BLOCK, FP4_PER_WORD, INT8_PER_WORD, const
from .lanes import LANES
from .packed_bytes import ADD_DOT, SELECT
from .top_lanes import GREATEST

WORDS = BLOCK // FP4_PER_WORD  # of a block of weights: a load
PIECE = 4  # words of activations in a load, of which a block has two
PIECES = BLOCK // INT8_PER_WORD // PIECE
_MAGNITUDES = (0x03020100, 0x0C080604)  # twice those of the codes 0 to 7
_SIGNS = 0x88888888
# Codes lie in the order 0 4 1 5 2 6 3 7, and bytes of activations are moved to that order.
_ORDERS = (0x5140, 0x7362)


class ExpertParts:
    """What a kernel reads: xq, xs, words and scales, as in `osscompile/kernels/matmul.py`."""

    def __init__(self, function: PrimFunc) -> None:
        tensors = {parameter.name: parameter for parameter in function.params}
        self.xq, self.xs = tensors["xq"], tensors["xs"]
        self.words, self.scales = tensors["words"], tensors["scales"]
        self.halves = int(self.words.shape[1]) if len(self.words.shape) == 5 else 1
        self.columns, self.blocks = map(int, self.words.shape[-3:-1])
        self.rows = int(self.xq.shape[0])
        self.turns = -(-self.blocks // LANES)

    def part(self, turn: Expr, thread: Expr) -> Expr:
        """Return a thread's block; turns past the last repeat that, and `factor` is 0 there."""
        return T.min(turn * LANES + thread, const(self.blocks - 1, "int64"))

    def factor(self, row: Expr, turn: Expr, thread: Expr) -> Expr:
        """Return half the scale of a block of activations, because weights are doubled."""
        exists = turn * LANES + thread < self.blocks
        scale = self.xs[row, self.part(turn, thread)] * const(0.5, "float32")
        return T.Select(exists, scale, const(0, "float32"))

    def load(self) -> Callable[..., object]:
        """Return a macro (word, scale, slot, expert, column, turn, thread) that loads a block of a
        column's weights, of both halves, into word [slots, halves, WORDS] uint32 and scale [slots,
        halves] uint32."""
        halves, part, at = self.halves, self.part, self._at
        words, scales = self.words, self.scales

        @T.macro
        def load(word, scale, slot, expert, column, turn, thread):  # type: ignore[no-untyped-def]
            for half in T.unroll(halves):
                word[slot, half, 0:WORDS] = words.vload(
                    [*at(expert, half, column, part(turn, thread)), 0], f"uint32x{WORDS}"
                )
                scale[slot, half] = T.Cast(
                    "uint32", scales[at(expert, half, column, part(turn, thread))]
                )

        return load  # type: ignore[no-any-return]

    def rounds(self, threads: int) -> int:
        """Return how many pieces a thread copies, where so many share the activations."""
        return -(-self.rows * self.blocks * PIECES // threads)

    def stage(self, threads: int) -> Callable[..., object]:
        """Return a macro (staged, flat, pieces, moved, number) by which a work-group of so many
        threads, each of which says its number, copies the activations to staged [rows, PIECES,
        blocks, PIECE] uint32, shared. `flat` is xq in words; a thread has pieces [`rounds`, PIECE]
        and moved [PIECE] uint32 for itself. All are loaded before the first is stored."""
        count, rounds, blocks = self.rows * self.blocks * PIECES, self.rounds(threads), self.blocks

        def in_order(pieces: Buffer, i: Expr, j: int) -> Expr:
            return _select(pieces[i, j // 2 * 2], pieces[i, j // 2 * 2 + 1], _ORDERS[j % 2])

        @T.macro
        def store(staged, moved, piece):  # type: ignore[no-untyped-def]
            if piece < count:
                staged[
                    piece // (blocks * PIECES), piece % PIECES, piece // PIECES % blocks, 0:PIECE
                ] = moved.vload([0], f"uint32x{PIECE}")

        @T.macro
        def stage(staged, flat, pieces, moved, number):  # type: ignore[no-untyped-def]
            for i in T.unroll(rounds):
                pieces[i, 0:PIECE] = flat.vload(
                    [T.min(i * threads + number, T.int64(count - 1)) * PIECE], f"uint32x{PIECE}"
                )
            for i in T.unroll(rounds):
                moved[0] = in_order(pieces, i, 0)
                moved[1] = in_order(pieces, i, 1)
                moved[2] = in_order(pieces, i, 2)
                moved[3] = in_order(pieces, i, 3)
                store(staged, moved, i * threads + number)

        return stage  # type: ignore[no-any-return]

    def multiply(self) -> Callable[..., object]:
        """Return a macro (sums, total, x, word, scale, slot, staged, row, turn, thread, factor,
        table) that adds the products of a loaded block to sums [halves] float32. A thread has total
        [2] int32 and x [PIECES, PIECE] uint32 for itself; `table` is what `table_call` gives."""
        halves, part = self.halves, self.part

        @T.macro
        def multiply(sums, total, x, word, scale, slot, staged, row, turn, thread, factor, table):  # type: ignore[no-untyped-def]
            for i in T.unroll(PIECES):
                x[i, 0:PIECE] = staged.vload([row, i, part(turn, thread), 0], f"uint32x{PIECE}")
            for half in T.unroll(halves):
                for sign in T.unroll(2):
                    total[sign] = 0
                for k in T.unroll(2 * WORDS):
                    for sign in T.unroll(2):
                        total[sign] = _add_dot(
                            _magnitudes(word[slot, half, k // 2], k % 2, sign, table),
                            x[k // 4, k % 4],
                            total[sign],
                        )
                sums[half] += T.Cast("float32", total[0] - total[1]) * (
                    _power(scale[slot, half]) * factor
                )

        return multiply  # type: ignore[no-any-return]

    def _at(self, expert: Expr, half: Expr, column: Expr, part: Expr) -> tuple[Expr, ...]:
        """Return the first indices of a block in words and scales."""
        middle = (half,) if self.halves == 2 else ()
        return (expert.astype("int64"), *middle, column, part)


def takes_parts(target: Target) -> bool:
    """Whether a target has the instructions."""
    return target.has_shuffles and target.selects_bytes and target.int8_dot is not None


def table_call() -> Expr:
    """Return the first half of what codes are looked up in, uint32, in a way that keeps it in a
    register: a compiler that knows the number writes it down anew for every look-up."""
    return T.call_extern("int32", GREATEST, T.int32(_MAGNITUDES[0])).astype("uint32")


def _magnitudes(word: Expr, half: Expr, sign: Expr, table: Expr) -> Expr:
    """Return twice the magnitudes of four codes, the lower or the higher, that have this sign; the
    others give 0, which the highest bit of such a byte is."""
    codes = word >> (half * 16).astype("uint32")
    return _select(
        table,
        const(_MAGNITUDES[1], "uint32"),
        codes ^ (sign.astype("uint32") * const(_SIGNS, "uint32")),
    )


def _add_dot(a: Expr, b: Expr, total: Expr) -> Expr:
    return T.call_pure_extern("int32", ADD_DOT, a, b, total)


def _select(low: Expr, high: Expr, selectors: Expr | int) -> Expr:
    if isinstance(selectors, int):
        selectors = const(selectors, "uint32")
    return T.call_pure_extern("uint32", SELECT, low, high, selectors)


def _power(exponent: Expr) -> Expr:
    """Return 2^(e - 127)."""
    return T.reinterpret("float32", exponent << const(23, "uint32"))
