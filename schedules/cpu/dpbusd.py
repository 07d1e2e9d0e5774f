"""Byte products by `dpbusd` of VNNI: unsigned x signed bytes, fours added exactly to int32.

This file has the same functions as `maddubs.py`.
"""

from tvm import DataType
from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK
from .avx2 import INT8_OFFSET, broadcast_activations, call, fp4_vector
from .vectors import VectorOf

ROWS, INPUTS = 1, 4  # rows of activations a product takes; inputs of a column in a panel's vector
Q8_OFFSET = INT8_OFFSET  # added to int8 weights in a panel
Q8_VECTORS = BLOCK // 4  # that a block of int8 weights fills in a panel
MXFP4_PARTS = Q8_PARTS = BLOCK // 4  # that a block's sum is added up in


def dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32) + the products of vector `part` of weights (uint8) and of activations
    (int8), which may have any width."""
    return _dpbusd(start, weight_of(part), x_of(part))


mxfp4_vector, four_activations = fp4_vector, broadcast_activations
mxfp4_dot_part = q8_dot_part = dot_part  # int8 weights need no other step


def q8_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32, w + 128 each."""
    word = T.reinterpret(word_of(vector), dtype="uint8x32")
    return T.bitwise_xor(word, T.broadcast(T.uint8(INT8_OFFSET), BLOCK))


def _dpbusd(sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Call dpbusd, which LLVM encodes for AVX-VNNI or AVX512-VNNI as the target has it."""
    dtype = str(sums.ty)
    return call(f"avx512.vpdpbusd.{DataType(dtype).lanes * 32}", dtype, sums, unsigned, signed)
