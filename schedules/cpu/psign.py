"""Byte products by `psign` and `maddubs` of AVX2, for a few rows of activations: int8 weights are
multiplied as |w| x (x with the sign of w), so that they are unpacked in no step.

This file has the same functions as `maddubs.py`.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK
from . import maddubs
from .avx2 import broadcast_activations, call
from .vectors import VectorOf

ROWS, INPUTS = maddubs.ROWS, maddubs.INPUTS
Q8_OFFSET = 0
Q8_VECTORS = Q8_PARTS = BLOCK // 4
MXFP4_PARTS = maddubs.MXFP4_PARTS

mxfp4_vector, mxfp4_dot_part = maddubs.mxfp4_vector, maddubs.mxfp4_dot_part
four_activations = broadcast_activations


def q8_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32: the bits of the int8 weights."""
    return T.reinterpret(word_of(vector), dtype="uint8x32")


def q8_dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32x8) + the products of vector `part` of weights (uint8x32) and of
    activations (int8x32): two of at most 127 x 127 fit in int16."""
    weights = T.reinterpret(weight_of(part), dtype="int8x32")
    magnitudes, signed = _with_sign(weights, weights), _with_sign(x_of(part), weights)
    return start + maddubs.widen(maddubs.products(magnitudes, signed))


def _with_sign(numbers: Expr, signs: Expr) -> Expr:
    return call("avx2.psign.b", "int8x32", numbers, signs)
