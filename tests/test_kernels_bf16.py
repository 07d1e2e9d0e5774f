"""Products of many rows of bfloat16 activations, as `multiply_bfloat16` makes them, against the
float64 reference: on the stand-in for CUDA, whose matrix units multiply as a GPU's do."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from cuda_device import H100
from kernel_cases import LIMIT, assert_close, mxfp4_weights, numbers, q8_weights
from kernel_runner import Array, Rule, build
from metal_device import needs_gxx
from reference import F64
from tvm import tirx
from tvm.tirx import PrimFunc

from osscompile.importer.graph import EXPERT_ROWS, TOKENS
from osscompile.importer.weights import mxfp4_words
from osscompile.kernels import matmul, rows
from osscompile.kernels.quantize import quantize
from osscompile.passes.multiply_bfloat16 import product_in_bfloat16, rounded_to_bfloat16
from osscompile.schedules.formats import FEW_EXPERT_ROWS, FEW_TOKENS
from osscompile.schedules.gpu import expert_tiles
from osscompile.schedules.gpu.threads import threads
from osscompile.schedules.gpu.tiles_bf16 import tiles_bf16
from osscompile.schedules.records import answering

pytestmark = needs_gxx

# Where the 64 inputs of a panel lie: a thread of a matrix unit multiplies neighbours.
ORDER = [
    16 * (place % 8 // 2)
    + 8 * (place // 32)
    + 4 * (place // 8 % 2)
    + place // 16 % 2
    + place % 2 * 2
    for place in range(64)
]


def bf16(x: Array) -> F64:
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def panels(x: Array) -> Array:
    """[rows, inputs] float32 -> [rows, panels, 64] uint16, with zeros after the last input."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 64))).astype(ml_dtypes.bfloat16)
    return padded.reshape(len(x), -1, 64)[:, :, ORDER].view(np.uint16)


def from_panels(bits: Array, inputs: int) -> F64:
    x = np.zeros(bits.shape)
    x[:, :, ORDER] = bits.view(ml_dtypes.bfloat16)
    assert not x.reshape(len(x), -1)[:, inputs:].any()
    return x.reshape(len(x), -1)[:, :inputs]


@cache
def chosen(**constants: int) -> Rule:
    return lambda function, target, _: tiles_bf16(function, target, answering(constants))


def swiglu_kernel(
    inputs: int, columns: int, num_experts: int, rows: tirx.Var = EXPERT_ROWS
) -> PrimFunc:
    kernel = matmul.moe_mxfp4_swiglu("q8", rows, num_experts, inputs, columns, LIMIT)
    return rounded_to_bfloat16(product_in_bfloat16(kernel, gathered=True), keep=False)


def check_dense(
    count: int, inputs: int, columns: int, rule: Rule | None = None, rows: tirx.Var = TOKENS
) -> None:
    x = numbers(25, count, inputs)
    codes, scales = q8_weights(26, columns, inputs)
    bias, residual = numbers(29, columns), numbers(30, count, columns)
    weights = bf16((codes * scales[..., None].astype(np.float32)).reshape(columns, inputs))
    kernel = matmul.dense_q8(rows, inputs, columns, True, True)
    built = build(product_in_bfloat16(kernel, gathered=False), H100, rule=rule)
    out = built(panels(x), codes.view("<u4"), scales, bias, residual)
    assert_close(out, bf16(x) @ weights.T + bias + residual)


def experts_of(num_rows: tuple[int, ...]) -> Array:
    """Return the expert of each row, of so many for each expert."""
    return np.repeat(np.arange(len(num_rows), dtype=np.int32), num_rows)


def check_swiglu(
    num_rows: tuple[int, ...],
    inputs: int,
    columns: int,
    rule: Rule | None = None,
    rows: tirx.Var = EXPERT_ROWS,
) -> None:
    row_expert, num_experts = experts_of(num_rows), len(num_rows)
    x = numbers(31, 1 + len(row_expert) // 2, inputs)
    row_token = np.random.default_rng(0).integers(len(x), size=len(row_expert), dtype=np.int32)
    blocks, scales = mxfp4_weights(32, inputs, num_experts, 2, columns)
    bias = numbers(33, num_experts, 2, columns)
    expected = []
    for row, e in zip(bf16(x)[row_token], row_expert.tolist(), strict=True):
        gate, up = reference.dequantize_mxfp4(blocks[e], scales[e]) @ row + bias[e]
        expected.append(reference.swiglu(gate, up, LIMIT))
    built = build(swiglu_kernel(inputs, columns, num_experts, rows), H100, rule=rule)
    out = built(panels(x), row_token, mxfp4_words(blocks), scales, bias, row_expert)
    # float32 sums round to another bfloat16 in few cases
    assert_close(from_panels(out, columns), bf16(np.stack(expected)), 1e-3)


def check_sum(
    num_rows: tuple[int, ...],
    inputs: int,
    columns: int,
    scales: Any = None,
    rule: Rule | None = None,
) -> None:
    row_expert, num_experts, tokens = experts_of(num_rows), len(num_rows), 7
    x = numbers(31, len(row_expert), inputs)
    blocks, default = mxfp4_weights(34, inputs, num_experts, columns)
    scales = default if scales is None else np.resize(scales, default.shape).astype(np.uint8)
    bias = numbers(35, num_experts, columns)
    expected = np.stack(
        [
            reference.dequantize_mxfp4(blocks[e], scales[e]) @ row + bias[e]
            for row, e in zip(bf16(x), row_expert.tolist(), strict=True)
        ]
    )
    rng = np.random.default_rng(23)
    slots = rng.integers(len(row_expert), size=(tokens, 4), dtype=np.int32)
    weights = rng.dirichlet(np.ones(4), tokens).astype(np.float32)
    residual = numbers(24, tokens, columns)
    kernel = matmul.moe_mxfp4_sum("q8", TOKENS, EXPERT_ROWS, num_experts, inputs, columns, 4)
    built = build(product_in_bfloat16(kernel, gathered=False), H100, rule=rule)
    rest = row_expert, slots, weights, residual
    out, sums = built(panels(x), mxfp4_words(blocks), scales, bias, *rest)
    assert_close(out, expected)
    assert_close(sums, residual + np.einsum("tkh,tk->th", expected[slots], weights))


# --- Products ---------------------------------------------------------------------------------

AWKWARD = [(1, 32, 64), (21, 96, 96), (64, 64, 20), (65, 128, 192), (128, 160, 128), (130, 64, 130)]


@pytest.mark.parametrize(("count", "inputs", "columns"), AWKWARD)
def test_dense(count: int, inputs: int, columns: int) -> None:
    """Rows fill a tile of either size or not, inputs end within a panel, columns within a tile."""
    check_dense(count, inputs, columns)


# rows of each expert: none, one, and around the ends of tiles of 64 and 128
ROWS_OF_EXPERTS = [
    (0, 0, 0, 0, 1),
    (5, 0, 3, 0, 0),
    (64, 65, 0, 1, 0),
    (0, 127, 0, 129, 0),
    (0, 256, 0, 128, 1),
]


@pytest.mark.parametrize("num_rows", ROWS_OF_EXPERTS, ids=repr)
def test_experts_without_rows_and_with_tiles_that_end_anywhere(num_rows: tuple[int, ...]) -> None:
    check_sum(num_rows, 64, 64)
    check_swiglu(num_rows, 64, 64)


def test_experts_whose_rows_many_threads_look_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each several times, and several rows at once."""
    monkeypatch.setattr(expert_tiles, "THREADS", 8)
    monkeypatch.setattr(expert_tiles, "TOGETHER", 3)

    def rule(*arguments: Any) -> Any:
        return tiles_bf16(*arguments)

    check_sum((0, 30, 0, 1, 60), 32, 20, rule=rule)
    check_sum((17, 31, 0, 0, 0), 32, 20, rule=rule)


@pytest.mark.parametrize(("inputs", "columns"), [(32, 20), (192, 130)])
def test_experts_of_any_width(inputs: int, columns: int) -> None:
    check_sum((3, 70), inputs, columns)
    check_swiglu((3, 70), inputs, columns)


# --- Products of few rows ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 128, 129])
def test_dense_with_rows_around_the_end_of_a_tile_and_of_few(count: int) -> None:
    """Warps have two panels or one, the last panel is half, and strips end within a work-group."""
    check_dense(count, 1056, 48)


@pytest.mark.parametrize(
    "num_rows", [(0, 1, 0, 8, 0), (9, 0, 16, 17), (0, 35, 0), (34, 17, 0)], ids=repr
)
def test_few_rows_of_an_expert(num_rows: tuple[int, ...]) -> None:
    """51 rows of three experts are many, others few."""
    check_sum(num_rows, 576, 64)
    check_swiglu(num_rows, 576, 64)


FEW = [(8, 2, 1), (8, 8, 3), (16, 2, 4), (16, 6, 96)]  # rows, stages, strips


@pytest.mark.parametrize(("rows", "stages", "strips"), FEW)
def test_every_tile_and_ring_of_few_rows(rows: int, stages: int, strips: int) -> None:
    rule = chosen(few_rows=rows, few_stages=stages, few_strips=strips)
    check_dense(21, 544, 80, rule)
    check_swiglu((3, 0, 9), 576, 64, rule)


def test_products_of_a_known_number_of_rows() -> None:
    """The functions for two to eight rows have the launches for few rows alone."""
    check_dense(8, 2880, 64, rows=FEW_TOKENS)
    check_swiglu((0, 9), 2880, 64, rows=FEW_EXPERT_ROWS)
    check_dense(2, 64, 20, rows=FEW_TOKENS)  # shapes for which there are only tiles of many


def test_few_rows_whose_numbers_are_none_show_in_their_rows_only() -> None:
    x = numbers(25, 9, 512)
    x[2, 40] = np.nan
    codes, scales = q8_weights(26, 64, 512)
    kernel = product_in_bfloat16(matmul.dense_q8(TOKENS, 512, 64, False, False), gathered=False)
    out = build(kernel, H100)(panels(x), codes.view("<u4"), scales)
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), np.arange(9) == 2)
    np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(9) == 2)


# --- Products of many rows --------------------------------------------------------------------

TILES = [(1, 64, 3), (1, 128, 4), (2, 64, 8), (4, 128, 4)]  # warpgroups, rows, stages


@pytest.mark.parametrize(("warpgroups", "rows", "stages"), TILES)
def test_every_tile_and_ring(warpgroups: int, rows: int, stages: int) -> None:
    """Steps are more than stages, and their number is odd."""
    rule = chosen(warpgroups=warpgroups, rows_together=rows, stages=stages)
    check_dense(130, 608, 96, rule)
    check_swiglu((70, 3), 608, 96, rule)


def test_products_of_2880() -> None:
    check_dense(17, 2880, 64)
    check_swiglu((0, 9), 2880, 64)
    check_sum((0, 9), 2880, 64)


def test_scales_from_2_to_the_minus_57_to_2_to_the_65() -> None:
    """Exact though fp4 becomes a bfloat16 that is far from its value."""
    check_sum((3, 2), 64, 64, scales=[70] * 64 + [120] * 64 + [192] * 128)


def test_no_number_in_a_row_shows_in_that_row_only() -> None:
    x = numbers(25, 5, 64)
    x[2, 40] = np.nan
    codes, scales = q8_weights(26, 64, 64)
    kernel = product_in_bfloat16(matmul.dense_q8(TOKENS, 64, 64, False, False), gathered=False)
    out = build(kernel, H100)(panels(x), codes.view("<u4"), scales)
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), np.arange(5) == 2)
    np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(5) == 2)


def test_a_thread_an_element() -> None:
    """The kernels mean what their schedules compute."""
    check_dense(3, 96, 20, threads)
    check_swiglu((1, 2), 96, 20, threads)


# --- Panels -----------------------------------------------------------------------------------

HARD = np.float32([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, -3.4e38, 1e-40, np.inf, -np.inf])


@pytest.mark.parametrize("inputs", [32, 64, 96, 2880])
def test_panels_of_what_is_rounded(inputs: int) -> None:
    """Ties go to even, and what is beyond the largest is infinite, as in numpy."""
    x = numbers(7, 21, inputs)
    x[3, :9] = HARD
    kernel = rounded_to_bfloat16(quantize("q8", TOKENS, inputs), keep=False)
    np.testing.assert_array_equal(build(kernel, H100)(x), panels(x))


def test_panels_of_no_number() -> None:
    x = numbers(7, 2, 64)
    x[1] = np.uint32(0x7FFFFFFF).view(np.float32)
    kernel = rounded_to_bfloat16(quantize("q8", TOKENS, 64), keep=False)
    out = from_panels(build(kernel, H100)(x), 64)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(x))


@pytest.mark.parametrize("keep", [True, False])
def test_rms_norm_in_panels(keep: bool) -> None:
    x, weight = numbers(8, 21, 96), numbers(9, 96)
    kernel = rounded_to_bfloat16(rows.rms_norm_quantized("q8", TOKENS, 96, 1e-5), keep)
    results = build(kernel, H100)(x, weight)
    *normed, out = results if keep else [results]
    expected = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-5)
    assert_close(from_panels(out, 96), bf16(expected), 1e-3)
    assert len(normed) == keep
    for values in normed:
        assert_close(values, expected)
