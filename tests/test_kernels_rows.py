"""Kernels that treat a token's row by itself: embed, normalise, move rows, quantise to int8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import reference
from kernel_cases import (
    DECODE,
    HERE,
    PREFILL,
    ROW_CASES,
    Case,
    Form,
    activations,
    assert_close,
    check_quantize,
    every_form,
    numbers,
    rms_norm,
)
from kernel_runner import Array, build
from reference import to_float64

from osscompile.importer.graph import TOKENS
from osscompile.kernels import rows
from osscompile.kernels.quantize import quantize
from osscompile.schedules.formats import DIGIT, FP4_OFFSET
from osscompile.targets import Target

# --- One token's row by itself ----------------------------------------------------------------


@every_form
@pytest.mark.parametrize("case", ROW_CASES, ids=lambda case: case.__name__)
def test_row_kernel(case: Callable[[Form], Case], form: Form) -> None:
    case(form).check()


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_rms_norm_of_2880(form: Form) -> None:
    rms_norm(form, 2880).check()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1e3, 1e15])
def test_rms_norm_of_zeros_of_less_than_eps_and_of_huge_rows(scale: float) -> None:
    case = rms_norm(DECODE)
    x, weight = case.inputs[0] * np.float32(scale), case.inputs[1]
    expected = reference.rms_norm(to_float64(x), to_float64(weight), 1e-5)
    dataclasses.replace(case, inputs=(x, weight), expected=expected).check()


# --- Activations as int8 ----------------------------------------------------------------------

HARD_BLOCKS = {
    "zeros": np.zeros(32),
    "negative_zeros": np.full(32, -0.0),
    "ties_to_even": np.r_[127, np.arange(-15.5, 15.5)],
    "one_value": np.r_[np.zeros(31), -3.7],
    "both_extremes": np.resize([5.0, -5.0], 32),
    "huge": np.linspace(-3.4e38, 3.4e38, 32),
    "smallest_normal": np.linspace(-1.2e-38, 1.2e-38, 32),
    "subnormal_scale": np.linspace(-1e-40, 1e-40, 32),
    "scale_rounded_down": np.full(32, 1.9e-43),  # 136 steps of 1.4e-45, divided by 1 of them
    "scale_rounded_to_zero": np.full(32, 4e-44),
}


@every_form
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_quantize_q8_is_exact(form: Form, scale: float) -> None:
    check_quantize(form, numbers(7, form.count, 96, scale=scale))


@pytest.mark.parametrize("block", HARD_BLOCKS)
def test_quantize_q8_of_hard_blocks(block: str) -> None:
    x = numbers(8, 21, 96)  # its neighbours must not change
    x[10, 32:64] = HARD_BLOCKS[block]
    check_quantize(PREFILL, x)
    check_quantize(DECODE, x[10:11])


# --- Activations as digits --------------------------------------------------------------------


def check_digits(x: Array, target: Target = HERE) -> None:
    """Check that digits are -64..63, and stand for the nearest multiples of the scale."""
    digits, scales, offsets = build(quantize("digits", TOKENS, x.shape[-1]), target)(x)
    assert digits.min() >= -64 and digits.max() <= 63
    places = np.array([DIGIT**2, DIGIT, 1])[:, None]
    whole = (digits.astype(np.int64) * places).sum(axis=2)
    np.testing.assert_array_equal(offsets, FP4_OFFSET * whole.sum(axis=-1))
    blocks = to_float64(x).reshape(whole.shape)
    error = np.abs(whole * to_float64(scales)[..., None] - blocks).max(axis=-1)
    assert (error <= np.abs(blocks).max(axis=-1) * 2.0**-20).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_quantize_digits_holds_20_bits_of_a_blocks_largest(scale: float) -> None:
    check_digits(numbers(9, 21, 96, scale=scale))


@pytest.mark.parametrize("block", ["zeros", "negative_zeros", "both_extremes", "one_value", "huge"])
def test_quantize_digits_of_hard_blocks(block: str) -> None:
    x = numbers(10, 21, 96)
    x[10, 32:64] = HARD_BLOCKS[block]
    check_digits(x)


@pytest.mark.parametrize("kind", ["q8", "digits"])
def test_quantize_of_what_is_no_number_shows(kind: str) -> None:
    check_no_number(kind)


def check_no_number(kind: str, target: Target = HERE) -> None:
    """Check that a NaN shows in its block's scale, wherever it lies among the 32."""
    x = numbers(12, 21, 96)
    rows_of, inputs = np.arange(10), np.resize([32, 40, 63], 10)
    x[rows_of, inputs] = np.resize([np.nan, -np.nan], 10)
    _, scales, _ = build(quantize(kind, TOKENS, 96), target)(x)
    shows = np.zeros(scales.shape, bool)
    shows[rows_of, 1] = True
    np.testing.assert_array_equal(np.isnan(scales), shows)


@every_form
@pytest.mark.parametrize("kind", ["q8", "digits"])
def test_gather_rows(form: Form, kind: str) -> None:
    check_gather(form, kind)


def check_gather(form: Form, kind: str, target: Target = HERE) -> None:
    arrays, _ = activations(numbers(11, form.count, 64), kind)
    tokens = np.resize(np.arange(form.count, dtype=np.int32)[::-1], 35)
    kernel = rows.gather_rows(kind, form.tokens, 64, form.expert_rows(35))
    for gathered, array in zip(build(kernel, target)(*arrays, tokens), arrays, strict=True):
        np.testing.assert_array_equal(gathered, array[tokens])


@every_form
@pytest.mark.parametrize("kind", ["q8", "digits"])
def test_rms_norm_quantized_is_the_norm_and_its_quantisation(form: Form, kind: str) -> None:
    check_norm_quantized(form, kind)


def check_norm_quantized(form: Form, kind: str, target: Target = HERE, hidden: int = 96) -> None:
    case = rms_norm(form, hidden)
    kernel = rows.rms_norm_quantized(kind, form.tokens, hidden, 1e-5)
    normed, *quantized = build(kernel, target)(*case.inputs)
    assert_close(normed, case.expected)
    for actual, expected in zip(quantized, activations(normed, kind)[0], strict=True):
        np.testing.assert_array_equal(actual, expected)
