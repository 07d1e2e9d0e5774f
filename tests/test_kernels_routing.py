"""Routing tokens to experts, sorting them, and the whole layer of experts."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import reference
from kernel_cases import (
    CLOSE,
    DECODE,
    HERE,
    LIMIT,
    PREFILL,
    Form,
    activations,
    assert_close,
    bf16_bits,
    check_choice,
    every_form,
    mxfp4_weights,
    numbers,
)
from kernel_runner import Array, build
from reference import F64, to_float64

from osscompile.importer.weights import mxfp4_words
from osscompile.kernels import experts, matmul, rows
from osscompile.targets import Target


def check_route(form: Form, logits: Array, top_k: int, target: Target = HERE) -> None:
    """Check a router that gives these logits."""
    num_experts = logits.shape[-1]
    inputs = -(-num_experts // 32) * 32
    x = np.zeros((form.count, inputs), np.float32)
    x[:, :num_experts] = logits
    weight = np.eye(num_experts, inputs, dtype=ml_dtypes.bfloat16).view(np.uint16)
    kernel = matmul.route_bf16(form.tokens, inputs, num_experts, top_k)
    found, *choice = build(kernel, target)(x, weight, np.zeros(num_experts, np.float32))
    np.testing.assert_allclose(found, logits, rtol=2**-21)  # matrix units keep 22 of 24 bits
    check_choice(found, *choice)


@every_form
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 4), (4, 4), (5, 1), (32, 4)])
def test_route(form: Form, num_experts: int, top_k: int) -> None:
    check_route(form, numbers(18, form.count, num_experts, scale=2.0), top_k)


@every_form
def test_route_ties_go_to_the_lower_id(form: Form) -> None:
    few = np.random.default_rng(19).integers(0, 3, (form.count, 8))
    check_route(form, few.astype(np.float32), 4)
    check_route(form, np.zeros((form.count, 8), np.float32), 4)
    check_route(form, np.resize(np.float32([0.0, -0.0]), (form.count, 8)), 4)


@pytest.mark.parametrize("scale", [1e3, 1e30, 3e38])
def test_route_huge_logits(scale: float) -> None:
    signs = np.float32([-1, 1, -0.5, 0.5, -0.25, 0.25, 0, 1])
    logits = np.resize(signs * np.float32(scale), (21, 8))
    check_route(PREFILL, logits, 4)


@every_form
def test_route_without_numbers_still_names_different_experts(form: Form) -> None:
    """Later kernels use the ids as addresses: a broken model must not crash the process."""
    check_broken_route(form)


def check_broken_route(form: Form, target: Target = HERE) -> None:
    x, weight = numbers(20, form.count, 32), bf16_bits(21, 8, 32)
    kernel = build(matmul.route_bf16(form.tokens, 32, 8, 4), target)
    for broken in (
        [np.nan] * 8,
        [np.nan, 1, np.nan] + [0] * 5,
        [-np.inf] * 8,
        [np.inf, -np.inf] * 4,
    ):
        _, _, ids, _ = kernel(x, weight, np.array(broken, np.float32))
        assert ids.min() >= 0 and ids.max() < 8
        assert all(len(set(choice)) == 4 for choice in ids.tolist())


CHOICES = {
    "spread": lambda rng, e, k: rng.permutation(e)[:k],
    "one_expert_unused": lambda rng, e, k: 1 + rng.permutation(e - 1)[:k],
    "only_the_first": lambda rng, e, k: np.arange(k),
    "only_the_last": lambda rng, e, k: np.arange(e - k, e)[::-1],
}


def choices(kind: str, form: Form, num_experts: int, top_k: int) -> Array:
    rng = np.random.default_rng(21)
    tokens = [CHOICES[kind](rng, num_experts, top_k) for _ in range(form.count)]
    return np.array(tokens, np.int32)


@every_form
@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 4), (32, 1)])
def test_sort_by_expert_finds_every_choice_once(
    form: Form, kind: str, num_experts: int, top_k: int
) -> None:
    check_sort(form, choices(kind, form, num_experts, top_k), num_experts)


def check_sort(form: Form, ids: Array, num_experts: int, target: Target = HERE) -> None:
    kernel = experts.sort_by_expert(form.tokens, num_experts, ids.shape[1])
    row_expert, row_token, slots = build(kernel, target)(ids)
    token = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    np.testing.assert_array_equal(np.sort(slots.reshape(-1)), np.arange(ids.size))
    np.testing.assert_array_equal(row_token[slots], token)
    np.testing.assert_array_equal(row_expert[slots], ids)
    order = row_expert.astype(np.int64) * len(ids) + row_token
    assert (np.diff(order) > 0).all()  # by expert, then by token


@pytest.mark.parametrize("kind", ["spread", "only_the_first"])
def test_sort_by_expert_of_512_tokens(kind: str) -> None:
    form = dataclasses.replace(PREFILL, count=512)
    check_sort(form, choices(kind, form, 8, 4), 8)


@pytest.mark.parametrize("kind", ["q8", "digits"])
@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_moe_layer_of_all_its_kernels(form: Form, kind: str) -> None:
    """Route, sort, gather, both products and the sum, with an expert that nobody chose."""
    num_experts, top_k, hidden, inner = 8, 4, 64, 96
    x, residual = (numbers(seed, form.count, hidden) for seed in (36, 37))
    router, router_bias = bf16_bits(38, num_experts, hidden), numbers(43, num_experts)
    router_bias[3] = -500
    gate_up, gate_up_scales = mxfp4_weights(39, hidden, num_experts, 2, inner)
    down, down_scales = mxfp4_weights(40, inner, num_experts, hidden)
    gate_up_bias, down_bias = numbers(41, num_experts, 2, inner), numbers(42, num_experts, hidden)

    route = build(matmul.route_bf16(form.tokens, hidden, num_experts, top_k), HERE)
    logits, _, ids, weights = route(x, router, router_bias)
    sort = experts.sort_by_expert(form.tokens, num_experts, top_k)
    row_expert, row_token, slots = build(sort, HERE)(ids)
    count = form.expert_rows(len(row_expert))
    gather = rows.gather_rows(kind, form.tokens, hidden, count)
    gathered = build(gather, HERE)(*activations(x, kind)[0], row_token)
    swiglu = matmul.moe_mxfp4_swiglu(kind, count, num_experts, hidden, inner, LIMIT)
    _, *act = build(swiglu, HERE)(
        *gathered,
        *(mxfp4_words(gate_up), gate_up_scales, gate_up_bias, row_expert),
    )
    moe = matmul.moe_mxfp4_sum(kind, form.tokens, count, num_experts, inner, hidden, top_k)
    _, out = build(moe, HERE)(
        *act,
        *(mxfp4_words(down), down_scales, down_bias, row_expert),
        *(slots, weights, residual),
    )

    def interleaved(pairs: F64) -> F64:
        return np.swapaxes(pairs, 1, 2).reshape(num_experts, 2 * inner, *pairs.shape[3:])

    expected = reference.moe(
        activations(x, kind)[1],
        *reference.route(to_float64(logits), top_k),
        interleaved(reference.dequantize_mxfp4(gate_up, gate_up_scales)),
        interleaved(to_float64(gate_up_bias)),
        reference.dequantize_mxfp4(down, down_scales),
        to_float64(down_bias),
        LIMIT,
    )
    # the second product quantises the first's results: one step in 127 of each block's largest
    assert_close(out - residual, expected, 0.02 if kind == "q8" else CLOSE)
