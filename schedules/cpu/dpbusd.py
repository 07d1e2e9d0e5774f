"""Byte products by `dpbusd` of VNNI: unsigned x signed bytes, fours added exactly to int32.

This file has the same functions as `maddubs.py`.
"""

from tvm import DataType
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK, DIGIT, DIGITS, INT8_PER_WORD
from .avx2 import INT8_OFFSET, broadcast_signed, call, fp4_unsigned, fp4_vector
from .vectors import LANES, VectorOf

ROWS, INPUTS = 1, 4  # rows of activations a product takes; inputs of a column in a panel's vector
Q8_OFFSET = INT8_OFFSET  # added to int8 weights in a panel
Q8_VECTORS = BLOCK // 4  # that a block of int8 weights fills in a panel
MXFP4_PARTS = Q8_PARTS = BLOCK // 4  # that a block's sum is added up in


def mxfp4_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of (2 x fp4 + 12) x int8: words [4, 8], x [32]."""
    sums = _zero()
    for v, w in enumerate(fp4_unsigned(weights)):
        sums = _dpbusd(sums, w, broadcast_signed(x, 4 * v))
    return sums


def mxfp4_digits_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of (2 x fp4 + 12) x digits: words [4, 8], x [digits, 32]."""
    total = None
    for digit in range(DIGITS):
        sums = _zero()
        for v, w in enumerate(fp4_unsigned(weights)):
            sums = _dpbusd(sums, w, broadcast_signed(x, digit, 4 * v))
        total = sums if total is None else total * T.broadcast(T.int32(DIGIT), LANES) + sums
    return total


def q8_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of int8 x int8: words [8, 8], x [32].

    w + 128 is unsigned, and its bits are those of w with the highest one flipped. It adds 128 times
    the sum of all x, which is subtracted.
    """
    offset = T.broadcast(T.uint8(INT8_OFFSET), BLOCK)
    of_lanes = _dpbusd(_zero(), offset, x.vload([0], "int8x32"))
    reduce_add = T.llvm_lookup_intrinsic_id("llvm.vector.reduce.add")
    sums = -T.broadcast(T.call_llvm_pure_intrin(reduce_add, of_lanes, dtype="int32"), LANES)
    for j in range(BLOCK // INT8_PER_WORD):
        w = T.reinterpret(weights.vload([j, 0], "uint32x8"), dtype="uint8x32")
        four = broadcast_signed(x, j * INT8_PER_WORD)
        sums = _dpbusd(sums, T.bitwise_xor(w, offset), four)
    return sums


def dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32) + the products of vector `part` of weights (uint8) and of activations
    (int8), which may have any width."""
    return _dpbusd(start, weight_of(part), x_of(part))


mxfp4_vector = fp4_vector
mxfp4_dot_part = q8_dot_part = dot_part  # int8 weights need no other step


def q8_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32, w + 128 each."""
    word = T.reinterpret(word_of(vector), dtype="uint8x32")
    return T.bitwise_xor(word, T.broadcast(T.uint8(INT8_OFFSET), BLOCK))


def _zero() -> Expr:
    return T.broadcast(T.int32(0), LANES)


def _dpbusd(sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Call dpbusd, which LLVM encodes for AVX-VNNI or AVX512-VNNI as the target has it."""
    dtype = str(sums.ty)
    return call(f"avx512.vpdpbusd.{DataType(dtype).lanes * 32}", dtype, sums, unsigned, signed)
