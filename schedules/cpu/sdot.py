"""Byte products by `sdot` of AArch64: signed x signed bytes, fours added exactly to int32.

This file has the same functions as `maddubs.py`. Bytes that are unsigned there (2 x fp4 + 12) are
below 128, and so the same when signed.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK
from .neon import call, fp4_vector, joined, registers
from .vectors import LANES, VectorOf

ROWS, INPUTS = 1, 4  # rows of activations a product takes; inputs of a column in a panel's vector
Q8_OFFSET = 0  # added to int8 weights in a panel
Q8_VECTORS = BLOCK // 4  # that a block of int8 weights fills in a panel
MXFP4_PARTS = Q8_PARTS = BLOCK // 4  # that a block's sum is added up in


def dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32x8) + the products of vector `part` of weights (uint8x32) and of
    activations (int8x32)."""
    return _sdot(start, weight_of(part), x_of(part))


mxfp4_vector = fp4_vector
mxfp4_dot_part = q8_dot_part = dot_part


def four_activations(x: Buffer, row: tuple[Expr, ...], vector: Expr) -> Expr:
    """Repeat the `vector`-th 4 of a block of activations, int8 [..., 32], in every 32-bit lane:
    `sdot` takes them out of a register."""
    fours = T.reinterpret(x.vload([*row, 0], "int8x32"), dtype="int32x8")
    return T.reinterpret(T.Shuffle([fours], [vector] * LANES), dtype="int8x32")


def q8_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32: the bits of the int8 weights."""
    return T.reinterpret(word_of(vector), dtype="uint8x32")


def _sdot(sums: Expr, weights: Expr, x: Expr) -> Expr:
    parts = zip(registers(sums), registers(weights), registers(x), strict=True)
    return joined([call("sdot", "int32x4", *part) for part in parts])
