"""Expressions that every x86 CPU with AVX2 computes alike: table lookup, broadcast, prefetch."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from tvm import DataType
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK, FP4_OFFSET, FP4_PER_WORD
from .prefetch import LINE_BYTES, fetch

VectorOf: TypeAlias = Callable[[Expr], Expr]  # of its number

LANES = 8  # of 32 bits: one a row of the weights
LINE_WORDS = LINE_BYTES // 4  # of 32 bits

_FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # of the 16 codes
FP4_UNSIGNED = tuple(value + FP4_OFFSET for value in _FP4_DOUBLED)
INT8_OFFSET = 128  # makes an int8 unsigned: its bits but for the highest, which flips


def call(instruction: str, dtype: str, *args: Expr) -> Expr:
    """An instruction by LLVM's name for it, without the leading `llvm.x86.`."""
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.{instruction}")
    return T.call_llvm_pure_intrin(intrinsic, *args, dtype=dtype)


def lookup(table: tuple[int, ...], dtype: str, codes: Expr) -> Expr:
    """The table's byte for the low nibble of every byte of `codes`, uint32x8."""
    words = np.array(table, np.int8).view("<i4").tolist()
    values = T.reinterpret(
        T.Shuffle([T.int32(word) for word in words * 2], list(range(LANES))), dtype=dtype
    )
    nibbles = T.bitwise_and(T.reinterpret(codes, dtype="uint8x32"), T.broadcast(T.uint8(15), 32))
    return call("avx2.pshuf.b", dtype, values, nibbles)


def fp4_unsigned(words: Buffer) -> list[Expr]:
    """A block of 8 rows, words [4, 8], as 8 vectors uint8x32 of 4 inputs each: 2 x fp4 + 12."""
    vectors = []
    for j in range(BLOCK // FP4_PER_WORD):
        word = words.vload([j, 0], "uint32x8")
        high = T.shift_right(word, T.broadcast(T.uint32(4), LANES))
        vectors += [lookup(FP4_UNSIGNED, "uint8x32", codes) for codes in (word, high)]
    return vectors


def fp4_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32, 2 x fp4 + 12 each; `word_of(j)` loads word j of the rows."""
    shift = (vector % 2 * 4).astype("uint32")
    codes = T.shift_right(word_of(vector // 2), T.broadcast(shift, LANES))
    return lookup(FP4_UNSIGNED, "uint8x32", codes)


def broadcast_four(four: Expr, dtype: str) -> Expr:
    """4 neighbouring bytes in every 32-bit lane of a vector of that type of bytes."""
    lanes = DataType(dtype).lanes // 4
    return T.reinterpret(T.broadcast(T.reinterpret(four, dtype="int32"), lanes), dtype=dtype)


def broadcast_signed(x: Buffer, *start: Expr) -> Expr:
    """4 neighbouring int8 in every 32-bit lane."""
    return broadcast_four(x.vload(list(start), "int8x4"), "int8x32")


def prefetch(words: Buffer, block: tuple[Expr, ...], line: Expr) -> Expr:
    """Fetch a cache line of a block of weights; one beyond their end is no fault."""
    word = line * LINE_WORDS
    return fetch(words[(*block, word // LANES, word % LANES)])
