"""Byte products by `maddubs` of AVX2: unsigned x signed bytes, neighbours added in int16.

Each 32-bit lane of a vector is one row of weights and holds 4 consecutive inputs of it. The sums of
a block (`*_sums`) read packed words; those of a panel (`*_dot`) unpacked vectors (`*_vector`).
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK, DIGIT, DIGITS, INT8_PER_WORD
from .avx2 import LANES, broadcast_signed, call, fp4_unsigned

Q8_VECTORS = 2 * BLOCK // 4  # of a block of int8 weights in a panel: low digits, then high ones


def mxfp4_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of (2 x fp4 + 12) x int8: words [4, 8], x [32].

    Four products of at most 24 x 127 x 2 fit in int16 before they are widened.
    """
    pairs = [_products(w, broadcast_signed(x, 4 * v)) for v, w in enumerate(fp4_unsigned(weights))]
    return _widen(_total(pairs[:4])) + _widen(_total(pairs[4:]))


def mxfp4_digits_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of (2 x fp4 + 12) x digits: words [4, 8], x [digits, 32].

    Eight products of at most 24 x 64 x 2 fit in int16.
    """
    sums = None
    for digit in range(DIGITS):
        pairs = [
            _products(w, broadcast_signed(x, digit, 4 * v))
            for v, w in enumerate(fp4_unsigned(weights))
        ]
        scaled = _widen(_total(pairs), DIGIT ** (DIGITS - 1 - digit))
        sums = scaled if sums is None else sums + scaled
    return sums


def q8_sums(weights: Buffer, x: Buffer) -> Expr:
    """int32x8 sums of int8 x int8: words [8, 8], x [32].

    |w| x (x with the sign of w): two products of at most 127 x 127 just fit in int16.
    """
    sums = []
    for j in range(BLOCK // INT8_PER_WORD):
        w = T.reinterpret(weights.vload([j, 0], "uint32x8"), dtype="int8x32")
        x_signed = call("avx2.psign.b", "int8x32", broadcast_signed(x, j * INT8_PER_WORD), w)
        sums.append(_widen(_products(call("avx2.psign.b", "int8x32", w, w), x_signed)))
    return _total(sums)


def mxfp4_dot(x: list[Expr], weights: list[Expr]) -> Expr:
    """int32x8 from 8 vectors each of activations (uint8x32) and weights: four products of at most
    2 x 255 x 12 fit in int16."""
    pairs = [_products(a, w) for a, w in zip(x, weights, strict=True)]
    return _widen(_total(pairs[:4])) + _widen(_total(pairs[4:]))


def q8_vector(word_of: Callable[[Expr], Expr], vector: Expr) -> Expr:
    """A digit of 4 inputs of 8 rows as int8x32: an int8 is 16 x high + low, low in -8..7."""
    word = T.reinterpret(word_of(vector % 8), dtype="uint8x32")

    def constant(value: int) -> Expr:
        return T.broadcast(T.uint8(value), 32)

    low = T.bitwise_xor(T.bitwise_and(word, constant(15)), constant(8)) - constant(8)
    floor = T.bitwise_and(_shifted_bytes(T.bitwise_xor(word, constant(128)), 4), constant(15))
    carry = T.bitwise_and(_shifted_bytes(word, 3), constant(1))
    high = floor - constant(8) + carry
    return T.reinterpret(T.Select(vector < 8, low, high), dtype="int8x32")


def q8_dot(x: list[Expr], weights: list[Expr]) -> Expr:
    """int32x8 from 8 vectors of activations (uint8x32), and of weights 8 of low and 8 of high
    digits: sixteen products of at most 255 x 8 fit in int16."""
    low, high = (
        _total([_products(a, w) for a, w in zip(x, digits, strict=True)])
        for digits in (weights[:8], weights[8:])
    )
    return _widen(low) + _widen(high, 16)


def _products(unsigned: Expr, signed: Expr) -> Expr:
    return call("avx2.pmadd.ub.sw", "int16x16", unsigned, signed)


def _widen(pairs: Expr, factor: int = 1) -> Expr:
    """Neighbouring int16 added to int32, times a factor."""
    return call("avx2.pmadd.wd", "int32x8", pairs, T.broadcast(T.int16(factor), 16))


def _shifted_bytes(x: Expr, count: int) -> Expr:
    """Bytes have no shift of their own: what comes from the neighbour is for the caller to mask."""
    shifted = T.shift_right(T.reinterpret(x, dtype="uint32x8"), T.broadcast(T.uint32(count), LANES))
    return T.reinterpret(shifted, dtype="uint8x32")


def _total(terms: list[Expr]) -> Expr:
    return sum(terms[1:], terms[0])
