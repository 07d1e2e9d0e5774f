"""Tensor intrinsics for a block of 8 rows of packed weights x 32 inputs and one row of activations.

What is described is the same for all CPUs; the sums are those of an instruction set (`maddubs.py`,
`dpbusd.py`).
"""

from functools import cache
from types import ModuleType

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from ..formats import (
    BLOCK,
    DIGITS,
    FP4_PER_WORD,
    INT8_PER_WORD,
    fp4_offset_by_12,
    int8_of_word,
    sum_of_digits,
)
from .avx2 import LANES, prefetch


@cache
def mxfp4_block(instructions: ModuleType, prefetch_bytes: int) -> str:
    """Register and name the intrinsic: int32 sums of (2 x fp4 + 12) x int8.

    Weights are fetched `prefetch_bytes` ahead: the hardware's own prefetch stops at pages.
    """
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
            for line in T.unroll(words * LANES // 16):
                T.evaluate(prefetch(weights, (), line + prefetch_bytes // 64))
            sums[0:LANES] = sums.vload([0], "int32x8") + instructions.mxfp4_sums(weights, x)

    return _register("mxfp4", instructions, prefetch_bytes, description, implementation)


@cache
def mxfp4_digits_block(instructions: ModuleType, prefetch_bytes: int) -> str:
    """Register and name the intrinsic: int32 sums of (2 x fp4 + 12) x digits."""
    words = BLOCK // FP4_PER_WORD

    @T.prim_func(private=True, s_tir=True)
    def description(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        expert: T.Buffer((1,), "int32", offset_factor=1),
        x: T.Buffer((DIGITS, BLOCK), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], expert[0], x[0:DIGITS, 0:BLOCK])
            T.writes(sums[0:LANES])
            for r, k in T.grid(LANES, BLOCK):
                with T.sblock("product"):
                    vr, vk = T.axis.remap("SR", [r, k])
                    T.reads(sums[vr], weights[vk // FP4_PER_WORD, vr], expert[0], x[0:DIGITS, vk])
                    T.writes(sums[vr])
                    sums[vr] = sums[vr] + fp4_offset_by_12(
                        weights[vk // FP4_PER_WORD, vr], vk % FP4_PER_WORD
                    ) * sum_of_digits(lambda digit: x[digit, vk])

    @T.prim_func(private=True, s_tir=True)
    def implementation(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        expert: T.Buffer((1,), "int32", offset_factor=1),
        x: T.Buffer((DIGITS, BLOCK), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], expert[0], x[0:DIGITS, 0:BLOCK])
            T.writes(sums[0:LANES])
            for line in T.unroll(words * LANES // 16):
                T.evaluate(prefetch(weights, (), line + prefetch_bytes // 64))
            sums[0:LANES] = sums.vload([0], "int32x8") + instructions.mxfp4_digits_sums(weights, x)

    return _register("mxfp4_digits", instructions, prefetch_bytes, description, implementation)


@cache
def q8_block(instructions: ModuleType, prefetch_bytes: int) -> str:
    """Register and name the intrinsic: int32 sums of int8 x int8."""
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
            for line in T.unroll(words * LANES // 16):
                T.evaluate(prefetch(weights, (), line + prefetch_bytes // 64))
            sums[0:LANES] = sums.vload([0], "int32x8") + instructions.q8_sums(weights, x)

    return _register("q8", instructions, prefetch_bytes, description, implementation)


def _register(
    block: str,
    instructions: ModuleType,
    prefetch_bytes: int,
    description: object,
    implementation: object,
) -> str:
    name = f"{instructions.__name__}_{block}_{prefetch_bytes}"
    TensorIntrin.register(name, description, implementation, override=True)
    return name
