"""Expressions that every AArch64 CPU computes alike: instructions by name, table lookup.

A vector of 8 rows takes two registers. LLVM splits it, but not for an instruction by name.
"""

from tvm import DataType
from tvm.ir import Expr
from tvm.script import tirx as T

from .vectors import FP4_UNSIGNED, VectorOf, constant

REGISTER_BITS = 128


def call(instruction: str, dtype: str, *args: Expr) -> Expr:
    """Call an instruction by LLVM's name for it, without the leading `llvm.aarch64.neon.`."""
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.aarch64.neon.{instruction}")
    return T.call_llvm_pure_intrin(intrinsic, *args, dtype=dtype)


def registers(vector: Expr) -> list[Expr]:
    """Split a vector into parts that fill a register each."""
    dtype = DataType(str(vector.ty))
    lanes = REGISTER_BITS // dtype.bits
    return [
        T.Shuffle([vector], list(range(first, first + lanes)))
        for first in range(0, dtype.lanes, lanes)
    ]


def joined(parts: list[Expr]) -> Expr:
    """Join registers to one vector."""
    return T.Shuffle(parts, list(range(len(parts) * DataType(str(parts[0].ty)).lanes)))


def fp4_vector(word_of: VectorOf, vector: Expr) -> Expr:
    """4 inputs of 8 rows as uint8x32, 2 x fp4 + 12 each; `word_of(j)` loads word j of the rows."""
    codes = T.reinterpret(word_of(vector // 2), dtype="uint8x32")
    shift = (vector % 2 * 4).astype("uint8")
    shifted = T.shift_right(codes, T.broadcast(shift, 32))
    nibbles = T.bitwise_and(shifted, T.broadcast(T.uint8(15), 32))
    table = constant(FP4_UNSIGNED, "uint8x16")
    return joined([call("tbl1", "uint8x16", table, part) for part in registers(nibbles)])
