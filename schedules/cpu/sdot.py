"""Byte products by `sdot` of AArch64: signed x signed bytes, fours added exactly to int32.

This file has the same functions as `maddubs.py`. Bytes that are unsigned there (2 x fp4 + 12) are
below 128, and so the same when signed.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK, DIGIT, DIGITS, INT8_PER_WORD
from .neon import call, fp4_vector, joined, registers
from .vectors import LANES, VectorOf

ROWS, INPUTS = 1, 4  # rows of activations a product takes; inputs of a column in a panel's vector
Q8_OFFSET = 0  # added to int8 weights in a panel
Q8_VECTORS = BLOCK // 4  # that a block of int8 weights fills in a panel
MXFP4_PARTS = Q8_PARTS = BLOCK // 4  # that a block's sum is added up in


def mxfp4_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of (2 x fp4 + 12) x int8: words [4, 8], x [32]."""
    return _sums(_fp4_vectors(weights), x)


def mxfp4_digits_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of (2 x fp4 + 12) x digits: words [4, 8], x [digits, 32]."""
    vectors = _fp4_vectors(weights)
    total = _sums(vectors, x, 0)
    for digit in range(1, DIGITS):
        total = total * T.broadcast(T.int32(DIGIT), LANES) + _sums(vectors, x, digit)
    return total


def q8_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of int8 x int8: words [8, 8], x [32]."""
    words = (weights.vload([j, 0], "uint32x8") for j in range(BLOCK // INT8_PER_WORD))
    return _sums([T.reinterpret(word, dtype="uint8x32") for word in words], x)


def dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32x8) + the products of vector `part` of weights (uint8x32) and of
    activations (int8x32)."""
    return _sdot(start, weight_of(part), x_of(part))


mxfp4_vector = fp4_vector
mxfp4_dot_part = q8_dot_part = dot_part


def q8_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32: the bits of the int8 weights."""
    return T.reinterpret(word_of(vector), dtype="uint8x32")


def _fp4_vectors(words: Buffer) -> list[Expr]:
    """Unpack a block of 8 rows, words [4, 8], to 8 uint8x32 of 4 inputs each: 2 x fp4 + 12."""
    return [
        fp4_vector(lambda j: words.vload([j, 0], "uint32x8"), T.int32(v)) for v in range(BLOCK // 4)
    ]


def _sums(weights: list[Expr], x: Buffer, *digit: int) -> Expr:
    """int32x8 sums of vectors of 4 inputs times x [32]; every lane holds the same 4 of x."""
    sums = T.broadcast(T.int32(0), LANES)
    fours = T.reinterpret(x.vload([*digit, 0], "int8x32"), dtype="int32x8")
    for v, weight in enumerate(weights):
        sums = _sdot(sums, weight, T.reinterpret(T.Shuffle([fours], [v] * LANES), dtype="int8x32"))
    return sums


def _sdot(sums: Expr, weights: Expr, x: Expr) -> Expr:
    parts = zip(registers(sums), registers(weights), registers(x), strict=True)
    return joined([call("sdot", "int32x4", *part) for part in parts])
