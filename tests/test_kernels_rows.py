"""Kernels of one token's row by itself: embedding, norm, moving rows, quantising to int8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import reference
from kernel_cases import (
    DECODE,
    PREFILL,
    ROW_CASES,
    Case,
    Form,
    check_quantize,
    every_form,
    int32,
    numbers,
    rms_norm,
    take_row,
)
from reference import to_float64

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


@pytest.mark.parametrize("token", [0, 7, 8, 23])
def test_take_row_at_the_ends_of_tiles(token: int) -> None:
    case = take_row(PREFILL)
    x = case.inputs[0]
    expected = x.reshape(1, -1, 64)[:, token : token + 1]
    dataclasses.replace(case, inputs=(x, int32(token)), expected=expected).check()


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
    check_quantize(form, numbers(7, form.count, form.tile, 96, scale=scale))


@pytest.mark.parametrize("block", HARD_BLOCKS)
def test_quantize_q8_of_hard_blocks(block: str) -> None:
    x = numbers(8, 3, 8, 96)  # its neighbours must not change
    x[1, 2, 32:64] = HARD_BLOCKS[block]
    check_quantize(PREFILL, x)
    check_quantize(DECODE, x[1:2, 2:3])
