"""Stages of kernels that multiply activations in bfloat16: what `passes/multiply_bfloat16.py` puts
in the place of stages that work on int8.

Activations lie in panels: uint16 [rows, panels, 64] holds the bits of a row's inputs, in the order
of `formats.panel_input`, with zeros after the last input. A weight is rounded to bfloat16 once; for
fp4 nothing is lost. Sums are float32.
"""

from collections.abc import Callable, Mapping

from tvm import te, tirx
from tvm.ir import Expr

from ..schedules.formats import (
    BLOCK,
    FP4_OFFSET,
    FP4_PER_WORD,
    INT8_PER_WORD,
    PANEL,
    bf16_to_float32,
    const,
    extent,
    float32_to_bf16,
    fp4_offset_by_12,
    half_e8m0_to_float32,
    int8_of_word,
    panel_input,
)

Tensors = Mapping[str, te.Tensor]  # a kernel's, by name


def num_panels(inputs: int) -> int:
    return -(-inputs // PANEL)


def in_panels(x: te.Tensor, name: str) -> te.Tensor:
    """x [rows, inputs] float32 -> its panels."""
    inputs = int(x.shape[1])

    def bits(i: Expr, p: Expr, place: Expr) -> Expr:
        k = p * PANEL + panel_input(place)
        if inputs % PANEL == 0:
            return float32_to_bf16(x[i, k])
        rounded = float32_to_bf16(x[i, tirx.min(k, extent(inputs - 1))])
        return tirx.Select(k < extent(inputs), rounded, const(0, "uint16"))

    return te.compute((x.shape[0], extent(num_panels(inputs)), extent(PANEL)), bits, name=name)


def dense_sum(tensors: Tensors, shape: tuple[Expr, ...]) -> te.Tensor:
    """xb of the rows, words [columns, blocks, 8] uint32, scales [columns, blocks] float16 -> sums
    of `shape` [rows, columns] float32."""
    words, scales = tensors["words"], tensors["scales"]

    def weight(i: Expr, r: tuple[Expr, ...], block: Expr, k: Expr) -> Expr:
        code = int8_of_word(words[(*r, block, k // INT8_PER_WORD)], k % INT8_PER_WORD)
        scaled = code.astype("float32") * scales[(*r, block)].astype("float32")
        return bf16_to_float32(float32_to_bf16(scaled))

    return _sum(tensors, weight, shape)


def expert_sum(tensors: Tensors, shape: tuple[Expr, ...]) -> te.Tensor:
    """xb of the tokens that row_token [rows] int32 names, or without it of the rows; words
    [experts, .., blocks, 4] uint32, scales [experts, .., blocks] uint8, row_expert [rows] int32 ->
    sums of `shape` [rows, ..] float32. Rows are sorted by expert."""
    words, scales, row_expert = (tensors[n] for n in ("words", "scales", "row_expert"))

    def weight(i: Expr, r: tuple[Expr, ...], block: Expr, k: Expr) -> Expr:
        at = (row_expert[i], *r, block)
        doubled = fp4_offset_by_12(words[(*at, k // FP4_PER_WORD)], k % FP4_PER_WORD)
        value = (doubled - const(FP4_OFFSET, "int32")).astype("float32")
        return value * half_e8m0_to_float32(scales[at])

    return _sum(tensors, weight, shape)


def _sum(tensors: Tensors, weight: Callable[..., Expr], shape: tuple[Expr, ...]) -> te.Tensor:
    xb, row_token = tensors["xb"], tensors.get("row_token")
    blocks = int(tensors["scales"].shape[-1])
    p = te.reduce_axis((extent(0), xb.shape[1]), name="p")
    place = te.reduce_axis((extent(0), extent(PANEL)), name="place")

    def term(i: Expr, *r: Expr) -> Expr:
        k = p * PANEL + panel_input(place)
        # an input that does not exist is zero, whatever weighs it
        block = k // BLOCK if blocks % 2 == 0 else tirx.min(k // BLOCK, extent(blocks - 1))
        x = bf16_to_float32(xb[i if row_token is None else row_token[i], p, place])
        return te.sum(weight(i, r, block, k % BLOCK) * x, axis=[p, place])

    return te.compute(shape, term, name="acc")
