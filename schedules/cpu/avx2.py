"""Expressions that every x86 CPU with AVX2 computes alike: instructions by name, table lookup."""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from .vectors import FP4_UNSIGNED, LANES, VectorOf, broadcast_four, constant

INT8_OFFSET = 128  # makes an int8 unsigned by flipping its highest bit


def call(instruction: str, dtype: str, *args: Expr) -> Expr:
    """Call an instruction by LLVM's name for it, without the leading `llvm.x86.`."""
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.{instruction}")
    return T.call_llvm_pure_intrin(intrinsic, *args, dtype=dtype)


def lookup(table: tuple[int, ...], dtype: str, codes: Expr) -> Expr:
    """Look up the low nibble of every byte of `codes` (uint32x8) in a table of bytes."""
    nibbles = T.bitwise_and(T.reinterpret(codes, dtype="uint8x32"), T.broadcast(T.uint8(15), 32))
    return call("avx2.pshuf.b", dtype, constant(table * 2, dtype), nibbles)


def broadcast_activations(x: Buffer, row: tuple[Expr, ...], vector: Expr) -> Expr:
    """Repeat the `vector`-th 4 of a block of activations, int8 [..., 32], in every 32-bit lane."""
    return broadcast_four(x.vload([*row, vector * 4], "int8x4"), "int8x32")


def fp4_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32, 2 x fp4 + 12 each; `word_of(j)` loads word j of the rows."""
    shift = (vector % 2 * 4).astype("uint32")
    codes = T.shift_right(word_of(vector // 2), T.broadcast(shift, LANES))
    return lookup(FP4_UNSIGNED, "uint8x32", codes)
