"""The TIR expressions that read numbers out of the words in which they are stored.

Every kernel of every target reads weights through these expressions, so that the meaning of a bit
is said once. The numpy side, which writes the same words, is `importer/weights.py`.
"""

from collections.abc import Callable
from typing import TypeAlias

from tvm import tirx
from tvm.ir import Expr

BLOCK = 32  # inputs that share one scale, in MXFP4 and in our int8
FP4_PER_WORD = 8  # a word is 32 bits of one row: 8 fp4 codes or 4 int8 values
INT8_PER_WORD = 4
FP4_OFFSET = (
    12  # added to 2 x fp4 so that the sum is unsigned: unsigned x signed dot products need it
)

# exact products take activations as whole numbers of three digits, with one scale a block
DIGITS = 3
DIGIT = 128  # a digit is -64..63, so that sums of eight products with fp4 fit in int16

# Products of bfloat16 take activations in panels of so many inputs, in an order of their own.
PANEL = 64
_BF16_NAN = 0x7FC0

# 2 x |fp4| for the codes 0..7 is 0, 1, 2, 3, 4, 6, 8, 12: one hexadecimal digit each.
_FP4_MAGNITUDES = 0xC8643210

# What a step is told of each of its rows, in int32: which token it is, at which position of its
# sequence, and where the sequence's table of pages begins. `runtime/kv_cache.py` writes it.
FACTS = 3
ID, POSITION, TABLE = range(FACTS)

Index: TypeAlias = int | Expr

# Kernels for a few rows, whose speed memory limits, are built for a known number or for these; the
# extents of those for any number have other names.
FEW_TOKENS = tirx.Var("few_tokens", "int64")
FEW_EXPERT_ROWS = tirx.Var("few_expert_rows", "int64")
_FEW = {FEW_TOKENS.name, FEW_EXPERT_ROWS.name}


def const(value: int | float, dtype: str) -> Expr:
    return tirx.const(value, dtype)


def is_few(rows: Index) -> bool:
    """Whether a number of rows, the extent of a buffer, is one of a few."""
    if isinstance(rows, tirx.Var):
        return rows.name in _FEW
    return isinstance(rows, int | tirx.IntImm)


def extent(value: Index) -> Expr:
    """Return a buffer extent in int64, as all are, because symbolic ones must be."""
    return tirx.const(value, "int64") if isinstance(value, int) else value


def ordered_bits(x: Expr) -> Expr:
    """Return int32 in the order of the float32; both zeros give the same."""
    bits = tirx.reinterpret("int32", x)
    magnitude = bits & const(0x7FFFFFFF, "int32")
    return tirx.Select(bits < const(0, "int32"), -magnitude, bits)


def fp4_offset_by_12(word: Expr, position: Expr) -> Expr:
    """Return 2 x value + 12, int32 in 0..24, of the fp4 at `position` 0..7 of a uint32 word.

    Positions p and p + 4 share byte p, p in the low nibble, so that one shift and one mask give
    four consecutive inputs in the four bytes of a word.
    """
    shift = position % 4 * 8 + position // 4 * 4
    code = (word >> shift.astype("uint32")) & const(15, "uint32")
    magnitude_shift = (code & const(7, "uint32")) * const(4, "uint32")
    magnitude = (const(_FP4_MAGNITUDES, "uint32") >> magnitude_shift) & const(15, "uint32")
    sign = const(1, "int32") - ((code >> const(2, "uint32")) & const(2, "uint32")).astype("int32")
    return sign * magnitude.astype("int32") + const(FP4_OFFSET, "int32")


def fp4_bytes_offset_by_12(word: Expr, half: Expr) -> Expr:
    """Return inputs 4 `half` to 4 `half` + 3 of a word of fp4 in four bytes, as 2 x value + 12."""

    def bits(place: int) -> Expr:
        return (codes >> const(place, "uint32")) & const(0x01010101, "uint32")

    codes = (word >> (half * 4).astype("uint32")) & const(0x0F0F0F0F, "uint32")
    low, both = bits(0), bits(1) & bits(2)
    # the codes 4 to 7 mean 4, 6, 8 and 12
    more = (low & bits(2)) + ((both + (both & low)) << const(1, "uint32"))
    magnitude = (codes & const(0x07070707, "uint32")) + more
    negative = magnitude & (bits(3) * const(255, "uint32"))
    return const(0x0C0C0C0C, "uint32") + magnitude - (negative << const(1, "uint32"))


def int8_of_word(word: Expr, position: Expr) -> Expr:
    """Return the int8 at byte `position` 0..3 of a uint32 word, as int32."""
    shift = (position * 8).astype("uint32")
    return (word >> shift).astype("uint8").astype("int8").astype("int32")


def bf16_to_float32(bits: Expr) -> Expr:
    """Convert the uint16 bits of a bfloat16 to float32."""
    return tirx.reinterpret("float32", bits.astype("uint32") << const(16, "uint32"))


def float32_to_bf16(x: Expr) -> Expr:
    """Return the uint16 bits of a float32 rounded to bfloat16, ties to even; NaN stays NaN."""
    bits, sixteen = tirx.Var("bits", "uint32"), const(16, "uint32")
    to_even = (bits >> sixteen) & const(1, "uint32")
    rounded = (bits + const(0x7FFF, "uint32") + to_even) >> sixteen
    is_nan = (bits & const(0x7FFFFFFF, "uint32")) > const(0x7F800000, "uint32")
    result = tirx.Select(is_nan, const(_BF16_NAN, "uint32"), rounded)
    return tirx.Let(bits, tirx.reinterpret("uint32", x), result).astype("uint16")


def panel_input(place: Expr) -> Expr:
    """Return which of a panel's inputs lies at `place`.

    A thread of a matrix unit multiplies the numbers at 16 s + 8 h + 2 q, + 1 (s, q 0..3; h 0, 1):
    they are the neighbouring inputs 16 q to 16 q + 15. So it finds its weights side by side, fp4
    in two words and int8 in four, and a mask takes two of them out of a word at once.
    """
    q, s, h, side = place % 8 // 2, place // 16, place // 8 % 2, place % 2
    return q * 16 + s // 2 * 8 + h * 4 + s % 2 + side * 2


def panel_place(k: Expr) -> Expr:
    """Return where input k of a panel lies: `panel_input` of it is k."""
    q, s, h, side = k // 16, k % 16 // 8 * 2 + k % 2, k // 4 % 2, k // 2 % 2
    return s * 16 + h * 8 + q * 2 + side


def half_e8m0_to_float32(exponent: Expr) -> Expr:
    """Convert uint8 e8m0 to float32 0.5 x 2^(exponent - 127); the half undoes the 2 of 2 x fp4."""
    scale = tirx.reinterpret("float32", exponent.astype("uint32") << const(23, "uint32"))
    return scale * const(0.5, "float32")


def sum_of_digits(digit_of: Callable[[int], Expr]) -> Expr:
    """Return the whole number, int32, that `DIGITS` int8 digits, highest first, stand for."""
    total = digit_of(0).astype("int32")
    for digit in range(1, DIGITS):
        total = total * const(DIGIT, "int32") + digit_of(digit).astype("int32")
    return total
