"""Matrix products, dense and of experts, against the float64 reference: shapes and extremes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
from kernel_cases import (
    DECODE,
    HERE,
    PREFILL,
    Case,
    Form,
    activations,
    assert_close,
    dense_bf16,
    dense_q8,
    dequantized,
    every_form,
    every_matmul,
    few_forms,
    int32,
    moe_mxfp4_sum_q8,
    moe_mxfp4_swiglu,
    moe_mxfp4_swiglu_q8,
    of_any_width,
    route_bf16,
)
from kernel_runner import Array, build

from osscompile.importer.graph import EXPERT_ROWS, TOKENS
from osscompile.importer.weights import mxfp4_words
from osscompile.kernels import matmul
from osscompile.schedules.formats import Index


@few_forms
@every_matmul
def test_matmul_of_a_few_rows(case: Callable[..., Case], form: Form) -> None:
    case(form).check()


@every_form
@every_matmul
def test_matmul(case: Callable[..., Case], form: Form) -> None:
    case(form).check()


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
@pytest.mark.parametrize("case", [dense_q8, dense_bf16], ids=lambda case: case.__name__)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_dense_without_bias_or_residual(
    case: Callable[..., Case], form: Form, bias: bool, residual: bool
) -> None:
    case(form, bias=bias, residual=residual).check()


@of_any_width
def test_matmul_of_4_rows_does_not_fill_a_vector(case: Callable[..., Case]) -> None:
    case(DECODE, 64, 4).check()


@pytest.mark.parametrize("case", [dense_bf16, moe_mxfp4_sum_q8], ids=lambda case: case.__name__)
def test_matmul_of_12_rows_leaves_a_vector_half_empty(case: Callable[..., Case]) -> None:
    case(PREFILL, 64, 12).check()


@pytest.mark.parametrize("num_experts", [4, 5, 128])
@every_form
def test_router_of_any_number_of_experts(form: Form, num_experts: int) -> None:
    route_bf16(form, 64, num_experts).check()


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
@pytest.mark.parametrize("case", [dense_q8, moe_mxfp4_sum_q8], ids=lambda case: case.__name__)
def test_matmul_of_one_block_and_one_vector(case: Callable[..., Case], form: Form) -> None:
    case(form, 32, 8).check()


@pytest.mark.parametrize("num_rows", [8 * 13, 8 * 25])
def test_matmul_row_groups_with_no_divisor_near_the_limit(num_rows: int) -> None:
    dense_q8(PREFILL, 32, num_rows).check()


@pytest.mark.parametrize("case", [dense_q8, dense_bf16], ids=lambda case: case.__name__)
def test_dense_of_2880_for_one_token(case: Callable[..., Case]) -> None:
    case(DECODE, 2880, 2880).check()


@pytest.mark.parametrize(
    "case", [moe_mxfp4_swiglu_q8, moe_mxfp4_sum_q8], ids=lambda case: case.__name__
)
def test_expert_of_2880_for_one_token(case: Callable[..., Case]) -> None:
    case(DECODE, 2880, 2880, 1).check()


@pytest.mark.parametrize("case", [dense_q8, moe_mxfp4_swiglu_q8], ids=lambda case: case.__name__)
def test_matmul_of_2880_for_many_tokens(case: Callable[..., Case]) -> None:
    case(PREFILL, 2880, 192).check()


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_int8_products_at_their_extremes_do_not_overflow(form: Form) -> None:
    """Every product is 127 x 127 or -127 x 127."""
    shape = (form.count, 64)
    x, values = activations(np.resize(np.float32([1, 1, -1]), shape), "q8")
    signs = np.resize(np.int8([[1], [-1], [1]]), (8, 64)) * np.resize(np.int8([1, 1, -1]), 64)
    codes = (signs * np.int8(127)).reshape(8, 2, 32)
    scales = np.full((8, 2), 2.0**-7, np.float16)
    kernel = matmul.dense_q8(form.tokens, 64, 8, False, False)
    Case(kernel, (*x, codes.view("<u4"), scales), values @ dequantized(codes, scales).T).check()


@pytest.mark.parametrize("code", [0x77, 0xFF, 0x7F, 0x00, 0x88])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [4, EXPERT_ROWS], ids=["decode", "prefill"])
def test_mxfp4_products_at_their_extremes_do_not_overflow(
    tokens: Index, code: int, sign: int
) -> None:
    """Every input is +-127 and every weight +-6 (or +-0, which leaves only the offset 12)."""
    x, values = activations(np.full((4, 64), sign, np.float32), "q8")
    blocks = np.full((1, 8, 2, 16), code, np.uint8)
    scales, bias = np.full((1, 8, 2), 127, np.uint8), np.full((1, 8), 0.5, np.float32)
    weight = reference.dequantize_mxfp4(blocks[0], scales[0])
    num_tokens = 1 if isinstance(tokens, int) else TOKENS
    kernel = matmul.moe_mxfp4_sum("q8", num_tokens, tokens, 1, 64, 8, 4)
    rest = (int32(0, 0, 0, 0), int32([0, 1, 2, 3]), np.ones((1, 4), np.float32))
    residual = np.zeros((1, 8), np.float32)
    expected = values @ weight.T + 0.5

    def check_sum(out: Array, sums: Array) -> None:
        assert_close(sums, expected.sum(axis=0, keepdims=True))

    inputs = (*x, mxfp4_words(blocks), scales, bias, *rest, residual)
    Case(kernel, inputs, expected, check_rest=check_sum).check()


@pytest.mark.parametrize("kind", ["q8", "digits"])
def test_swiglu_clamps_beyond_7_and_survives_hugely_negative_gates(kind: str) -> None:
    """Biases push gate and up to +-1e4, with every pair of signs in every form of the vector."""
    bias = np.zeros((8, 2, 96), np.float32)
    bias[:, 0] = np.resize([1e4, -1e4, 1e4, -1e4, 0, 20, -4, 7], 96)
    bias[:, 1] = np.resize([1e4, 1e4, -1e4, -1e4, 0, -20, 20, -7], 96)
    case = moe_mxfp4_swiglu(PREFILL, kind, bias=bias)
    expected = case.expected
    assert np.ptp(expected[..., 0::8]) == np.ptp(expected[..., 2::8]) == 0  # both are clamped
    out, *_ = build(case.kernel, HERE)(*case.inputs)
    for column in (0, 2, 4, 5, 6, 7):
        assert_close(out[..., column::8], expected[..., column::8], 1e-5)
    for column in (1, 3):
        assert np.abs(out[..., column::8]).max() < 1e-30
