"""One block of 8 rows x 32 inputs by `dpbusd`, the unsigned x signed byte product of VNNI.

Each 32-bit lane of a vector is one row; its word holds consecutive inputs of that row, so that a
broadcast of 4 activations meets the same inputs in all rows. The instruction adds the 4 products of
a lane to its sum, exactly.
"""

from functools import cache

from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import BLOCK, FP4_PER_WORD, INT8_PER_WORD, fp4_offset_by_12, int8_of_word

LANES = 8
# How far ahead of the products weights are fetched: the hardware's own prefetch stops at pages.
PREFETCH_WORDS = 1024 // 4

# 2 x fp4 + 12 for the 16 codes, as four little-endian words
_FP4_TABLE = (0x0F0E0D0C, 0x18141210, 0x090A0B0C, 0x00040608)


@cache
def mxfp4_block(prefetch: bool) -> str:
    """Register and name the intrinsic: int32 sums of (2 x fp4 + 12) x int8, for 8 rows."""
    words = BLOCK // FP4_PER_WORD

    # `expert` is described because the block reads it to find its weights; the sums need it not.
    @T.prim_func(private=True, s_tir=True)
    def description(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        expert: T.Buffer((1,), "int32", offset_factor=1),
        x: T.Buffer((BLOCK,), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], expert[0], x[0:BLOCK])
            T.writes(sums[0:LANES])
            for r, k in T.grid(LANES, BLOCK):
                with T.sblock("product"):
                    vr, vk = T.axis.remap("SR", [r, k])
                    T.reads(sums[vr], weights[vk // FP4_PER_WORD, vr], expert[0], x[vk])
                    T.writes(sums[vr])
                    sums[vr] = sums[vr] + fp4_offset_by_12(
                        weights[vk // FP4_PER_WORD, vr], vk % FP4_PER_WORD
                    ) * T.Cast("int32", x[vk])

    @T.prim_func(private=True, s_tir=True)
    def implementation(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        expert: T.Buffer((1,), "int32", offset_factor=1),
        x: T.Buffer((BLOCK,), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], expert[0], x[0:BLOCK])
            T.writes(sums[0:LANES])
            for line in T.unroll(2 if prefetch else 0):
                T.evaluate(_prefetch(weights, line * 16))
            sums[0:LANES] = _add_mxfp4(sums.vload([0], "int32x8"), weights, x)

    return _register(f"mxfp4_block_dpbusd{'_prefetch' * prefetch}", description, implementation)


@cache
def q8_block(prefetch: bool) -> str:
    """Register and name the intrinsic: int32 sums of int8 x int8, for 8 rows."""
    words = BLOCK // INT8_PER_WORD

    @T.prim_func(private=True, s_tir=True)
    def description(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        x: T.Buffer((BLOCK,), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], x[0:BLOCK])
            T.writes(sums[0:LANES])
            for r, k in T.grid(LANES, BLOCK):
                with T.sblock("product"):
                    vr, vk = T.axis.remap("SR", [r, k])
                    sums[vr] = sums[vr] + int8_of_word(
                        weights[vk // INT8_PER_WORD, vr], vk % INT8_PER_WORD
                    ) * T.Cast("int32", x[vk])

    @T.prim_func(private=True, s_tir=True)
    def implementation(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        x: T.Buffer((BLOCK,), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], x[0:BLOCK])
            T.writes(sums[0:LANES])
            for line in T.unroll(4 if prefetch else 0):
                T.evaluate(_prefetch(weights, line * 16))
            sums[0:LANES] = _add_q8(sums.vload([0], "int32x8"), weights, x)

    return _register(f"q8_block_dpbusd{'_prefetch' * prefetch}", description, implementation)


def _add_mxfp4(sums: Expr, weights: Buffer, x: Buffer) -> Expr:
    table = T.reinterpret(
        T.Shuffle([T.int32(word) for word in _FP4_TABLE * 2], list(range(8))), dtype="uint8x32"
    )
    nibble = T.broadcast(T.uint8(15), 32)
    for j in range(BLOCK // FP4_PER_WORD):
        word = weights.vload([j, 0], "uint32x8")
        low = T.reinterpret(word, dtype="uint8x32")
        high = T.reinterpret(T.shift_right(word, T.broadcast(T.uint32(4), 8)), dtype="uint8x32")
        for half, codes in enumerate((low, high)):
            values = _call("x86.avx2.pshuf.b", "uint8x32", table, T.bitwise_and(codes, nibble))
            sums = _dpbusd(sums, values, _broadcast_four(x, j * FP4_PER_WORD + half * 4))
    return sums


def _add_q8(sums: Expr, weights: Buffer, x: Buffer) -> Expr:
    """w + 128 is unsigned, and its bits are those of w with the highest one flipped; 128 times the
    sum of all x, which that adds, is taken off."""
    offset = T.broadcast(T.uint8(128), BLOCK)
    lanes = _dpbusd(T.broadcast(T.int32(0), LANES), offset, x.vload([0], "int8x32"))
    sums = sums - T.broadcast(_call("vector.reduce.add", "int32", lanes), LANES)
    for j in range(BLOCK // INT8_PER_WORD):
        w = T.reinterpret(weights.vload([j, 0], "uint32x8"), dtype="uint8x32")
        sums = _dpbusd(sums, T.bitwise_xor(w, offset), _broadcast_four(x, j * INT8_PER_WORD))
    return sums


def _broadcast_four(x: Buffer, start: int) -> Expr:
    """Four neighbouring activations in every 32-bit lane."""
    four = T.reinterpret(x.vload([start], "int8x4"), dtype="int32")
    return T.reinterpret(T.broadcast(four, LANES), dtype="int8x32")


def _dpbusd(sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """LLVM encodes it as the target has it: with AVX-VNNI, or AVX512-VNNI for short vectors."""
    return _call("x86.avx512.vpdpbusd.256", "int32x8", sums, unsigned, signed)


def _call(instruction: str, dtype: str, *args: Expr) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.{instruction}")
    return T.call_llvm_pure_intrin(intrinsic, *args, dtype=dtype)


def _prefetch(weights: Buffer, word: Expr) -> Expr:
    address = T.address_of(weights[0, PREFETCH_WORDS + word])
    return T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(3), T.int32(1))


def _register(name: str, description: object, implementation: object) -> str:
    TensorIntrin.register(name, description, implementation, override=True)
    return name
