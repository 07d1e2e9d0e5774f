"""Byte products by `maddubs` of AVX2: unsigned x signed bytes, neighbours added in int16.

Each 32-bit lane of a vector is one row of weights and holds 4 consecutive inputs of it. `*_vector`
unpacks packed words; `*_dot_part` multiplies what was unpacked.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK
from .avx2 import INT8_OFFSET, call, fp4_vector
from .vectors import LANES, VectorOf

ROWS, INPUTS = 1, 4  # rows of activations a product takes; inputs of a column in a panel's vector
Q8_OFFSET = INT8_OFFSET  # added to int8 weights in a panel
Q8_VECTORS = 2 * BLOCK // 4  # that a block of int8 weights fills: low digits, then high ones
MXFP4_PARTS = Q8_PARTS = 2  # that a block's sum is added up in


mxfp4_vector = fp4_vector


def mxfp4_dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32x8) + the products of half of the 8 vectors of weights (uint8x32) and of
    activations (int8x32): four of at most 24 x 127 x 2 fit in int16."""
    vectors = [part * 4 + i for i in range(4)]
    return start + widen(total([products(weight_of(v), x_of(v)) for v in vectors]))


def q8_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """Return a digit of 4 inputs of 8 rows as uint8x32: w + 128 = 16 x high + low, both 0..15."""
    word = T.reinterpret(word_of(vector % 8), dtype="uint8x32")
    unsigned = T.bitwise_xor(word, T.broadcast(T.uint8(INT8_OFFSET), 32))
    shift = T.broadcast((vector // 8 * 4).astype("uint32"), LANES)  # AVX2 cannot shift bytes
    shifted = T.shift_right(T.reinterpret(unsigned, dtype="uint32x8"), shift)
    return T.bitwise_and(T.reinterpret(shifted, dtype="uint8x32"), T.broadcast(T.uint8(15), 32))


def q8_dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32x8) + the products of 8 vectors (uint8x32) of the low, or of the high,
    digits of weights with 8 vectors of activations (int8x32): eight of at most 15 x 127 x 2 fit in
    int16."""
    sums = total([products(weight_of(part * 8 + i), x_of(T.int32(i))) for i in range(8)])
    return start + widen(sums, T.Select(part == 0, T.int16(1), T.int16(16)))


def products(unsigned: Expr, signed: Expr) -> Expr:
    return call("avx2.pmadd.ub.sw", "int16x16", unsigned, signed)


def widen(pairs: Expr, factor: int | Expr = 1) -> Expr:
    """Add neighbouring int16, times a factor, to int32."""
    factor = T.int16(factor) if isinstance(factor, int) else factor
    return call("avx2.pmadd.wd", "int32x8", pairs, T.broadcast(factor, 16))


def total(terms: list[Expr]) -> Expr:
    return sum(terms[1:], terms[0])
