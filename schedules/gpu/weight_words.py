"""Turn the stored words of a thread's weights into pairs of bfloat16, as `wgmma` takes them."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import FP4_PER_WORD, INT8_PER_WORD, const
from .packed_bytes import SELECT
from .wgmma import MULTIPLY_PAIRS, PACK, STEP

QUARTER = STEP // 4  # inputs of a row that a thread has in a step
PAIRS = 4  # of eight neighbouring inputs, in the order of `formats.panel_input`

# An fp4 code, with its magnitude where bfloat16 has the last bit of the exponent and the first two
# of the mantissa, is its value times 2^-126, subnormal or not. Scales are 2^(e - 127), and sums
# are scaled back at the end: products with scales from 2^-57 to 2^65 are exact in bfloat16, and no
# weight that a model computes with has another.
FP4_SHIFT = 64  # scales are too small by 2^64
_SIGNS, _MAGNITUDES = 0x80008000, 0x01C001C0
_SCALE_BIAS = 126 - FP4_SHIFT
# A byte u between other bits of a float32: 128 + u / 256.
_FLOAT = 0x43000000
_OFFSET = 128 + 128 / 256  # of what stands for 0


class Fp4Words:
    """Two words of eight codes a row and step; a scale is an e8m0."""

    words = QUARTER // FP4_PER_WORD
    scale_dtype = "uint32"
    factor = 2.0**FP4_SHIFT

    @staticmethod
    def scale(stored: Expr) -> Expr:
        """Return 2^(e - 1) x 2^-64 as bfloat16, in both halves."""
        bits = (stored.astype("uint32") + const(_SCALE_BIAS, "uint32")) * const(128, "uint32")
        return bits * const(0x10001, "uint32")

    @staticmethod
    def pair(word_of: Callable[[Expr], Expr], v: Expr, n: Expr, scale: Expr) -> Expr:
        """Return the n-th pair of the v-th eight inputs: the codes 4 n and 4 n + 16 bits from a
        word's begin."""
        signs = _moved(word_of(v), 12 - n * 4) & const(_SIGNS, "uint32")
        magnitudes = _moved(word_of(v), 6 - n * 4) & const(_MAGNITUDES, "uint32")
        return T.call_pure_extern("uint32", MULTIPLY_PAIRS, signs | magnitudes, scale)


class Int8Words:
    """Four words of four bytes a row and step; a scale is a float16."""

    words = QUARTER // INT8_PER_WORD
    scale_dtype = "float32"
    factor = 1.0

    @staticmethod
    def scale(stored: Expr) -> Expr:
        return stored.astype("float32")

    @staticmethod
    def pair(word_of: Callable[[Expr], Expr], v: Expr, n: Expr, scale: Expr) -> Expr:
        """Return the n-th pair of the v-th eight inputs, rounded once: the bytes n // 2 and two
        further on."""
        word = word_of(v * 2 + n % 2) ^ const(0x80808080, "uint32")
        low, high = (_product(word, byte, scale) for byte in (n // 2, n // 2 + 2))
        return T.call_pure_extern("uint32", PACK, low, high)


def _moved(word: Expr, left: Expr) -> Expr:
    """Return a word whose bits are moved to the left, or by a negative number to the right."""
    zero = const(0, "int32")
    moved = word << T.max(left, zero).astype("uint32")
    return moved >> T.max(-left, zero).astype("uint32")


def _product(word: Expr, byte: Expr, scale: Expr) -> Expr:
    """Return the byte, less 128, times the scale: exact, since what is subtracted has few bits."""
    selectors = const(0x7404, "uint32") + (byte * 16).astype("uint32")
    bits = T.call_pure_extern("uint32", SELECT, word, const(_FLOAT, "uint32"), selectors)
    factor = scale * const(256.0, "float32")
    offset = scale * const(-256.0 * _OFFSET, "float32")
    number = T.reinterpret(bits, dtype="float32")
    return T.call_pure_extern("float32", "fmaf", number, factor, offset)
