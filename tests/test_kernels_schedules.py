"""Kernels with other schedules than the best of this machine: the fallback rule, no int8 products,
narrower vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from kernel_cases import (
    DECODE,
    HERE,
    PREFILL,
    ROW_CASES,
    Case,
    Form,
    check_quantize,
    dense_bf16,
    dense_q8,
    every_matmul,
    moe_mxfp4_sum_q8,
    moe_mxfp4_swiglu_q8,
    numbers,
    of_any_width,
    rotate_queries,
)

from osscompile.schedules.cpu.rows import rows as fallback

NO_INT8_DOT = dataclasses.replace(HERE, int8_dot=None)
NARROW = dataclasses.replace(HERE, int8_dot=None, vector_bits=128)


@every_matmul
def test_matmul_under_the_fallback_rule(case: Callable[..., Case]) -> None:
    case(PREFILL).check(rule=fallback)


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (dense_q8, DECODE),
        (dense_q8, PREFILL),
        (moe_mxfp4_swiglu_q8, DECODE),
        (moe_mxfp4_sum_q8, PREFILL),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.name,
)
def test_matmul_without_int8_products(case: Callable[..., Case], form: Form) -> None:
    case(form).check(NO_INT8_DOT)


@of_any_width
def test_matmul_in_vectors_of_128_bits(case: Callable[..., Case]) -> None:
    case(DECODE, 64, 24).check(NARROW)


@pytest.mark.parametrize("num_rows", [32, 128, 192])
@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_swiglu_in_vectors_of_128_bits(form: Form, num_rows: int) -> None:
    """The rows make one task, or as many blocks as fill vectors, which several tasks quantise."""
    moe_mxfp4_swiglu_q8(form, 64, num_rows).check(NARROW)


@pytest.mark.parametrize("case", [dense_q8, dense_bf16, moe_mxfp4_sum_q8], ids=lambda c: c.__name__)
def test_matmul_of_tiles_in_vectors_of_128_bits(case: Callable[..., Case]) -> None:
    case(PREFILL, 64, 24).check(NARROW)


def test_matmul_rows_that_fill_narrow_vectors_only() -> None:
    dense_bf16(PREFILL, 64, 4).check(NARROW)
    dense_q8(DECODE, 64, 12).check(NARROW)


@pytest.mark.parametrize("case", [*ROW_CASES, rotate_queries], ids=lambda case: case.__name__)
def test_row_kernel_in_vectors_of_128_bits(case: Callable[[Form], Case]) -> None:
    case(PREFILL).check(NARROW)


def test_quantize_q8_in_vectors_of_128_bits() -> None:
    check_quantize(PREFILL, numbers(43, 21, 96), NARROW)
