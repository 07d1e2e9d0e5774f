"""Routing tokens to experts, sorting them, summing what comes back, and all of it as one layer."""

from __future__ import annotations

import dataclasses

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
    combine_experts,
    every_form,
    mxfp4_weights,
    numbers,
)
from kernel_runner import Array, build
from reference import F64, to_float64

from osscompile.importer.graph import TILES
from osscompile.importer.weights import mxfp4_words
from osscompile.kernels import experts, matmul, rows


def check_route(form: Form, logits: Array, top_k: int) -> None:
    kernel = experts.route(form.tiles, form.tile, logits.shape[-1], top_k)
    ids, weights = build(kernel, HERE)(logits)
    expected_ids, expected_weights = reference.route(
        to_float64(logits).reshape(-1, logits.shape[-1]), top_k
    )
    np.testing.assert_array_equal(ids.reshape(-1, top_k), expected_ids)
    np.testing.assert_allclose(weights.reshape(-1, top_k), expected_weights, rtol=1e-6, atol=1e-37)


@every_form
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 4), (4, 4), (5, 1), (32, 4)])
def test_route(form: Form, num_experts: int, top_k: int) -> None:
    check_route(form, numbers(18, form.count, form.tile, num_experts, scale=2.0), top_k)


@every_form
def test_route_ties_go_to_the_lower_id(form: Form) -> None:
    few = np.random.default_rng(19).integers(0, 3, (form.count, form.tile, 8))
    check_route(form, few.astype(np.float32), 4)
    check_route(form, np.zeros((form.count, form.tile, 8), np.float32), 4)
    check_route(form, np.resize(np.float32([0.0, -0.0]), (form.count, form.tile, 8)), 4)


@pytest.mark.parametrize("scale", [1e3, 1e30, 3e38])
def test_route_huge_logits(scale: float) -> None:
    signs = np.float32([-1, 1, -0.5, 0.5, -0.25, 0.25, 0, 1])
    logits = np.resize(signs * np.float32(scale), (3, 8, 8))
    check_route(PREFILL, logits, 4)


def test_route_without_numbers_still_names_different_experts() -> None:
    """Later kernels use the ids as addresses: a broken model must not crash the process."""
    logits = numbers(20, 3, 8, 8)
    logits[0, 0] = np.nan
    logits[1, 1, 2:] = np.nan
    logits[2, 2] = -np.inf
    ids, _ = build(experts.route(TILES, 8, 8, 4), HERE)(logits)
    assert ids.min() >= 0 and ids.max() < 8
    assert all(len(set(choice)) == 4 for choice in ids.reshape(-1, 4).tolist())


CHOICES = {
    "spread": lambda rng, e, k: rng.permutation(e)[:k],
    "one_expert_unused": lambda rng, e, k: 1 + rng.permutation(e - 1)[:k],
    "only_the_first": lambda rng, e, k: np.arange(k),
    "only_the_last": lambda rng, e, k: np.arange(e - k, e)[::-1],
}


def choices(kind: str, form: Form, num_experts: int, top_k: int) -> Array:
    rng = np.random.default_rng(21)
    tokens = [CHOICES[kind](rng, num_experts, top_k) for _ in range(form.count * form.tile)]
    return np.array(tokens, np.int32).reshape(form.count, form.tile, top_k)


@every_form
@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 4), (32, 1)])
def test_sort_by_expert_finds_every_choice_once(
    form: Form, kind: str, num_experts: int, top_k: int
) -> None:
    ids = choices(kind, form, num_experts, top_k)
    kernel = experts.sort_by_expert(form.tiles, form.tile, num_experts, top_k)
    tile_expert, tile_token, slots, _ = build(kernel, HERE)(ids)
    token = np.broadcast_to(np.arange(ids[..., 0].size)[:, None], (ids[..., 0].size, top_k))
    assert len(np.unique(slots)) == slots.size  # no two choices share a row
    np.testing.assert_array_equal(tile_token.reshape(-1)[slots.reshape(-1)], token.reshape(-1))
    np.testing.assert_array_equal(tile_expert[slots // form.tile], ids)
    # rows that nobody asked for are computed too: they need an expert and a token that exist
    assert tile_expert.min() >= 0 and tile_expert.max() < num_experts
    assert tile_token.min() >= 0 and tile_token.max() < ids[..., 0].size


@pytest.mark.parametrize("kind", ["spread", "only_the_first"])
def test_sort_by_expert_of_512_tokens(kind: str) -> None:
    form = dataclasses.replace(PREFILL, count=64)
    test_sort_by_expert_finds_every_choice_once(form, kind, 8, 4)


@every_form
def test_combine_experts(form: Form) -> None:
    combine_experts(form).check()


@pytest.mark.parametrize("quantized", [True, False], ids=["q8", "f32"])
@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_moe_layer_of_all_its_kernels(form: Form, quantized: bool) -> None:
    """Route, sort, gather, both products and the sum, with an expert that nobody chose."""
    num_experts, top_k, hidden, inner = 8, 4, 64, 96
    tokens, tile = form.count * form.tile, form.tile
    x, residual = (numbers(seed, form.count, tile, hidden) for seed in (36, 37))
    logits = numbers(38, form.count, tile, num_experts)
    logits[..., 3] = -50
    gate_up, gate_up_scales = mxfp4_weights(39, hidden, num_experts, 2, inner)
    down, down_scales = mxfp4_weights(40, inner, num_experts, hidden)
    gate_up_bias, down_bias = numbers(41, num_experts, 2, inner), numbers(42, num_experts, hidden)

    size = (form.tiles, tile)
    ids, weights = build(experts.route(*size, num_experts, top_k), HERE)(logits)
    sort = experts.sort_by_expert(*size, num_experts, top_k)
    tile_expert, tile_token, slots, _ = build(sort, HERE)(ids)
    count = form.expert_tiles(len(tile_expert))
    gathered = build(rows.gather_rows(*size, hidden, count), HERE)(x, tile_token)
    swiglu = matmul.moe_mxfp4_swiglu(quantized, count, tile, num_experts, hidden, inner, LIMIT)
    act = build(swiglu, HERE)(
        *activations(gathered, quantized)[0],
        *(mxfp4_words(gate_up), gate_up_scales, gate_up_bias, tile_expert),
    )
    moe = matmul.moe_mxfp4(quantized, count, tile, num_experts, inner, hidden)
    y = build(moe, HERE)(
        *activations(act, quantized)[0],
        *(mxfp4_words(down), down_scales, down_bias, tile_expert),
    )
    combine = experts.combine_experts(*size, hidden, count, top_k)
    out = build(combine, HERE)(y, slots, weights, residual)

    def interleaved(pairs: F64) -> F64:
        return np.swapaxes(pairs, 1, 2).reshape(num_experts, 2 * inner, *pairs.shape[3:])

    expected = reference.moe(
        activations(x, quantized)[1].reshape(tokens, hidden),
        *reference.route(to_float64(logits).reshape(tokens, num_experts), top_k),
        interleaved(reference.dequantize_mxfp4(gate_up, gate_up_scales)),
        interleaved(to_float64(gate_up_bias)),
        reference.dequantize_mxfp4(down, down_scales),
        to_float64(down_bias),
        LIMIT,
    )
    # the second product quantises the first's results: one step in 127 of each block's largest
    assert_close(out - residual, expected.reshape(out.shape), 0.02 if quantized else CLOSE)
