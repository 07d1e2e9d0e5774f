"""Tensor intrinsics for a block of 8 rows of packed weights x 32 inputs and one row of activations.

The description is the same for all CPUs; an instruction set (`maddubs.py`, `dpbusd.py`, `sdot.py`)
computes the sums.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType

from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion, PrimFunc

from ..formats import (
    BLOCK,
    DIGITS,
    FP4_PER_WORD,
    INT8_PER_WORD,
    fp4_offset_by_12,
    int8_of_word,
    sum_of_digits,
)
from .vectors import LANES, prefetch


@cache
def mxfp4_block(instructions: ModuleType, prefetch_bytes: int) -> str:
    """Register and name the intrinsic: int32 sums of (2 x fp4 + 12) x int8.

    Weights are fetched `prefetch_bytes` ahead: the hardware's own prefetch stops at pages.
    """

    def value(x: Buffer, k: Expr) -> Expr:
        return x[k].astype("int32")

    functions = _mxfp4((BLOCK,), value, instructions.mxfp4_sums, prefetch_bytes)
    return _register("mxfp4", instructions, prefetch_bytes, *functions)


@cache
def mxfp4_digits_block(instructions: ModuleType, prefetch_bytes: int) -> str:
    """Register and name the intrinsic: int32 sums of (2 x fp4 + 12) x digits."""

    def value(x: Buffer, k: Expr) -> Expr:
        return sum_of_digits(lambda digit: x[digit, k])

    functions = _mxfp4((DIGITS, BLOCK), value, instructions.mxfp4_digits_sums, prefetch_bytes)
    return _register("mxfp4_digits", instructions, prefetch_bytes, *functions)


def _mxfp4(
    shape: tuple[int, ...],
    value: Callable[[Buffer, Expr], Expr],
    sums_of: Callable[[Buffer, Buffer], Expr],
    prefetch_bytes: int,
) -> tuple[PrimFunc, PrimFunc]:
    """Return description and implementation for activations of `shape`; `value` reads input k."""
    words = BLOCK // FP4_PER_WORD

    def whole(x: Buffer) -> BufferRegion:
        return x[tuple(slice(0, size) for size in shape)]

    def parts_of(x: Buffer, k: Expr) -> BufferRegion:
        return x[(*(slice(0, size) for size in shape[:-1]), slice(k, k + 1))]

    # The block reads `expert` to find its weights, so it is described; the sums do not need it.
    @T.prim_func(private=True, s_tir=True)
    def description(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        expert: T.Buffer((1,), "int32", offset_factor=1),
        x: T.Buffer(shape, "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], expert[0], whole(x))
            T.writes(sums[0:LANES])
            for r, k in T.grid(LANES, BLOCK):
                with T.sblock("product"):
                    vr, vk = T.axis.remap("SR", [r, k])
                    T.reads(sums[vr], weights[vk // FP4_PER_WORD, vr], expert[0], parts_of(x, vk))
                    T.writes(sums[vr])
                    sums[vr] = sums[vr] + fp4_offset_by_12(
                        weights[vk // FP4_PER_WORD, vr], vk % FP4_PER_WORD
                    ) * value(x, vk)

    @T.prim_func(private=True, s_tir=True)
    def implementation(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        expert: T.Buffer((1,), "int32", offset_factor=1),
        x: T.Buffer(shape, "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], weights[0:words, 0:LANES], expert[0], whole(x))
            T.writes(sums[0:LANES])
            for line in T.unroll(words * LANES // 16):
                T.evaluate(prefetch(weights, (), line + prefetch_bytes // 64))
            sums[0:LANES] = sums.vload([0], "int32x8") + sums_of(weights, x)

    return description, implementation


@cache
def q8_block(instructions: ModuleType, prefetch_bytes: int) -> str:
    """Register and name the intrinsic: int32 sums of int8 x int8."""
    words = BLOCK // INT8_PER_WORD

    @T.prim_func(private=True, s_tir=True)
    def description(
        weights: T.Buffer((words, LANES), "uint32", offset_factor=1),
        x: T.Buffer((BLOCK,), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1),
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
        sums: T.Buffer((LANES,), "int32", offset_factor=1),
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
    description: PrimFunc,
    implementation: PrimFunc,
) -> str:
    name = f"{instructions.__name__}_{block}_{prefetch_bytes}"
    TensorIntrin.register(name, description, implementation, override=True)
    return name
