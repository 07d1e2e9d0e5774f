"""What products of bytes share, for panels and for a few rows: how weights are unpacked, where a
sum begins, and how it is scaled.

Byte products need one factor unsigned, so weights are unpacked plus an offset. The offset adds
offset x the sum of a row's activations to the row's sum, which is subtracted before the sum begins.
Digits of activations (in exact products) are summed one after the other, the highest first.
"""

from types import ModuleType

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK, DIGIT, FP4_OFFSET, half_e8m0_to_float32
from ..product import Product
from .prefetch import LINE_BYTES
from .vectors import LANES


class ByteProduct:
    """The expressions of a kernel's product by an instruction set (see `instructions.py`)."""

    def __init__(self, product: Product, instructions: ModuleType) -> None:
        self._tensors, self._num_rows = product.tensors, product.num_rows
        self._digits = product.digits
        self._fp4 = product.expert is not None
        self.inputs = instructions.INPUTS
        if self._fp4:
            self._vector, self.dot_part = instructions.mxfp4_vector, instructions.mxfp4_dot_part
            self.parts, self.vectors = instructions.MXFP4_PARTS, BLOCK // self.inputs
            self._offset = FP4_OFFSET
        else:
            self._vector, self.dot_part = instructions.q8_vector, instructions.q8_dot_part
            self.parts, self.vectors = instructions.Q8_PARTS, instructions.Q8_VECTORS
            self._offset = instructions.Q8_OFFSET
        block_bytes = BLOCK // 2 if self._fp4 else BLOCK
        self.lines = block_bytes * LANES // LINE_BYTES  # of the cache, in a block

    def unpacked(self, at: tuple[Expr, ...], vector: Expr) -> Expr:
        """Return a vector of the block that begins at `at` in words."""
        words = self._tensors["words"]
        return self._vector(lambda word: words.vload([*at, word, 0], "uint32x8"), vector)

    def scale_of(self, at: tuple[Expr, ...], lane: Expr) -> Expr:
        scale = self._tensors["scales"][(*at, lane)]
        return half_e8m0_to_float32(scale) if self._fp4 else scale.astype("float32")

    def row_of(self, first: Expr, t: Expr) -> Expr:
        """Return the t-th row; those beyond the last repeat the last, and are not kept."""
        return T.min(first + t, self._num_rows - 1)

    def at_digit(self, row: Expr, block: Expr, digit: Expr) -> tuple[Expr, ...]:
        """Return where a digit of a row's block is in the activations."""
        return (row, block, *((digit,) if self._digits > 1 else ()))

    def begin(self, total: Expr, digit: Expr, row: Expr, block: Expr, lanes: int) -> Expr:
        """Return what a digit is added to: the sum so far, and for the last digit the offset."""
        offset = self._offset_of(self._tensors["xoffset"][row, block])
        start = T.Select(digit == self._digits - 1, -offset, T.int32(0))
        return total * T.broadcast(T.int32(DIGIT), lanes) + T.broadcast(start, lanes)

    def scaled(self, total: Expr, scale: Expr, row: Expr, block: Expr, lanes: int) -> Expr:
        of_row = T.broadcast(self._tensors["xs"][row, block], lanes)
        return total.astype(f"float32x{lanes}") * (scale * of_row)

    def _offset_of(self, xoffset: Expr) -> Expr:
        """Return the offset x the sum of a row's activations in a block, from FP4's offset x that
        sum: an exact quotient by 3 is a product modulo 2^32."""
        if self._offset == FP4_OFFSET:
            return xoffset
        if self._offset == 0:
            return T.int32(0)
        assert FP4_OFFSET == 12 and self._offset % 4 == 0
        factor = T.uint32(self._offset // 4 * pow(3, -1, 1 << 32) % (1 << 32))
        return T.reinterpret(T.reinterpret(xoffset, dtype="uint32") * factor, dtype="int32")
