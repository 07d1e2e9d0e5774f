"""Expressions on vectors of 8 rows of weights that every CPU computes alike."""

from collections.abc import Callable
from typing import TypeAlias

from tvm import DataType
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import FP4_OFFSET
from .prefetch import LINE_BYTES, fetch

VectorOf: TypeAlias = Callable[[Expr], Expr]  # a vector's number -> the vector

LANES = 8  # of 32 bits, one for each row of weights
LINE_WORDS = LINE_BYTES // 4  # of 32 bits

_FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # for the 16 codes
FP4_UNSIGNED = tuple(value + FP4_OFFSET for value in _FP4_DOUBLED)


def constant(table: tuple[int, ...], dtype: str) -> Expr:
    """Return a vector of the table's bytes; `dtype` has as many."""
    words = [int.from_bytes(bytes(table[i : i + 4]), "little") for i in range(0, len(table), 4)]
    vector = T.Shuffle([T.int32(word) for word in words], list(range(len(words))))
    return T.reinterpret(vector, dtype=dtype)


def broadcast_four(four: Expr, dtype: str) -> Expr:
    """Repeat 4 neighbouring bytes in every 32-bit lane of a vector of type `dtype`."""
    lanes = DataType(dtype).lanes // 4
    return T.reinterpret(T.broadcast(T.reinterpret(four, dtype="int32"), lanes), dtype=dtype)


def prefetch(words: Buffer, block: tuple[Expr, ...], line: Expr) -> Expr:
    """Fetch a cache line of a block of weights; a line beyond their end is no fault."""
    word = line * LINE_WORDS
    return fetch(words[(*block, word // LANES, word % LANES)])
