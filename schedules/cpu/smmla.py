"""Byte products by `smmla` of AArch64: in panels, two rows of activations x two columns at once,
eights of products added exactly to int32.

This file has the same functions as `maddubs.py`.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK
from . import sdot
from .neon import call, joined, registers
from .vectors import LANES, VectorOf

ROWS, INPUTS = 2, 8  # rows of activations a product takes; inputs of a column in a panel's vector
Q8_OFFSET = sdot.Q8_OFFSET
Q8_VECTORS = BLOCK // INPUTS  # that a block of int8 weights fills in a panel
MXFP4_PARTS = Q8_PARTS = BLOCK // INPUTS  # that a block's sum is added up in

# A register holds 2 x 2 sums: columns 2j and 2j + 1 for one row of activations, then for the other.
_IN_SQUARES = [
    row * LANES + column + j for column in range(0, LANES, 2) for row in range(ROWS) for j in (0, 1)
]
_IN_ROWS = [_IN_SQUARES.index(place) for place in range(ROWS * LANES)]
_IN_COLUMNS = [place for column in range(LANES) for place in (column, LANES + column)]


def mxfp4_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """8 inputs of 8 rows of weights as uint8x64, 2 x fp4 + 12 each, row after row."""
    return _by_rows([sdot.mxfp4_vector(word_of, vector * 2 + half) for half in (0, 1)])


def q8_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """8 inputs of 8 rows of weights as uint8x64, the bits of int8, row after row."""
    return _by_rows([sdot.q8_vector(word_of, vector * 2 + half) for half in (0, 1)])


def dot_part(start: Expr, weight_of: VectorOf, x_of: VectorOf, part: Expr) -> Expr:
    """Return `start` (int32x16: 8 columns for each of two rows of activations) + the products of
    vector `part` of weights (uint8x64) and of activations (int8x16: 8 inputs of each row)."""
    squares = zip(
        registers(T.Shuffle([start], _IN_SQUARES)), registers(weight_of(part)), strict=True
    )
    sums = [call("smmla", "int32x4", square, x_of(part), weights) for square, weights in squares]
    return T.Shuffle([joined(sums)], _IN_ROWS)


mxfp4_dot_part = q8_dot_part = dot_part


def _by_rows(fours: list[Expr]) -> Expr:
    """Join two vectors of 4 inputs of 8 rows to one with 8 inputs of row after row."""
    words = [T.reinterpret(four, dtype="int32x8") for four in fours]
    return T.reinterpret(T.Shuffle(words, _IN_COLUMNS), dtype="uint8x64")
