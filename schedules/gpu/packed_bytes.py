"""Read and multiply quantised numbers, four bytes of a uint32 at a time.

`DOT` and `SELECT` name functions that a target's source begins with.

DOT, int32 (uint32 a, uint32 b), sums the products of the four signed bytes of each. ADD_DOT takes
an int32 to add the sum to, too.
SELECT, uint32 (uint32 low, uint32 high, uint32 selectors), returns a byte for each of the lowest
four nibbles of the selectors. A nibble's lower three bits number one of the eight bytes; where its
highest bit is set, the result is that byte's sign, eight times.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from ...targets import Target
from ..formats import FP4_OFFSET, INT8_PER_WORD, const, fp4_bytes_offset_by_12, int8_of_word

DOT = "dot_4x8"
ADD_DOT = "add_dot_4x8"
SELECT = "select_bytes"

# 12 + 2 x value of the codes 0 to 7, and 12 - 2 x value, as unsigned bytes
_POSITIVE = (0x0F0E0D0C, 0x18141210)
_NEGATIVE = (0x090A0B0C, 0x00040608)
_HIGHEST_BITS = 0x88888888


def dot_by_instruction(a: Expr, b: Expr) -> Expr:
    return T.call_pure_extern("int32", DOT, a, b)


def dot(a: Expr, b: Expr, target: Target) -> Expr:
    """Sum four products of signed bytes, by the target's instruction if it has one."""
    if target.int8_dot is not None:
        return dot_by_instruction(a, b)
    places = [const(i, "int64") for i in range(INT8_PER_WORD)]
    first, *others = (int8_of_word(a, i) * int8_of_word(b, i) for i in places)
    return sum(others, start=first)


def fp4_bytes(word: Expr, half: Expr, target: Target) -> Expr:
    """Return inputs 4 `half` to 4 `half` + 3 of a word of fp4 in four bytes, as 2 x value + 12."""
    if not target.selects_bytes:
        return fp4_bytes_offset_by_12(word, half)
    # the nibbles of a word are inputs 0 4 1 5 2 6 3 7
    looked_up = (_look_up(word), _look_up(word >> const(16, "uint32")))
    even = const(0x6420, "uint32")
    return _select(*looked_up, even + half.astype("uint32") * const(0x1111, "uint32"))


def fp4_signed_bytes(word: Expr, half: Expr, target: Target) -> Expr:
    """Return the inputs of `fp4_bytes` as signed bytes, 2 x value."""
    highest = const(0x80808080, "uint32")  # so that no byte borrows from the next
    offset = const(FP4_OFFSET * 0x01010101, "uint32")
    return ((fp4_bytes(word, half, target) | highest) - offset) ^ highest


def _look_up(codes: Expr) -> Expr:
    """Return 2 x value + 12 of the lowest four codes. A code's highest bit is its sign: each table
    answers for one sign, and gives 0, the sign of its bytes, for the other."""
    positive, negative = (
        (const(low, "uint32"), const(high, "uint32")) for low, high in (_POSITIVE, _NEGATIVE)
    )
    inverted = codes ^ const(_HIGHEST_BITS, "uint32")
    return _select(*positive, codes) | _select(*negative, inverted)


def _select(low: Expr, high: Expr, selectors: Expr) -> Expr:
    return T.call_pure_extern("uint32", SELECT, low, high, selectors)
