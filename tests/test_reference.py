"""The judge, tested by numbers worked out by hand and by properties that the maths must have."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from random_model import random_model, read_checkpoint, write_checkpoint
from reference import (
    F64,
    Ablation,
    Model,
    apply_rope,
    attention,
    dequantize_mxfp4,
    dequantize_q8,
    kl_divergence,
    moe,
    quantize_q8,
    relative_rms,
    rms_norm,
    route,
    swiglu,
    to_float64,
    top1_agreement,
    yarn_inv_freq,
    yarn_range,
)

GPT_OSS_YARN = {
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
# Original context and `truncate` -> the ends of the ramp, and the inverse frequencies 1, 5 and 31,
# from the formula of `_compute_yarn_parameters` in transformers. Unclamped, the first number of the
# first line would be -3.07.
YARN_OF_SHORT_CONTEXTS = {
    (64, False): (
        (0, 6.2317300382971705),
        (0.5819293206068759, 0.03459476061514621, 3.0235114281192144e-07),
    ),
    (64, True): ((0, 7), (0.5936854956982837, 0.04784502801084582, 3.0235114281192144e-07)),
    (128, False): (
        (0, 8.092779115512402),
        (0.6065619272390713, 0.06235792524921348, 3.0235114281192144e-07),
    ),
    (128, True): ((0, 9), (0.6148763424071457, 0.07172901944943229, 3.0235114281192144e-07)),
    (256, False): (
        (0.6485828066514776, 9.953828192727633),
        (0.6638353975431046, 0.08495901711389515, 3.0235114281192144e-07),
    ),
    (256, True): ((0, 10), (0.6222931387552475, 0.08008841645293757, 3.0235114281192144e-07)),
}
NUM_TOKENS = 75  # spans several windows of the random model
NO_SINK = np.array([-np.inf])


def random_ids(num_tokens: int = NUM_TOKENS) -> list[int]:
    return [int(i) for i in np.random.default_rng(7).integers(0, 320, num_tokens)]


# --- MXFP4 and q8 -----------------------------------------------------------------------------


def test_mxfp4_table_and_nibble_order() -> None:
    """The codes are 0..15 then 15..0, low nibble first, with the scales 1/2 and 4."""
    ascending = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    descending = [0xEF, 0xCD, 0xAB, 0x89, 0x67, 0x45, 0x23, 0x01]
    block = np.array(ascending + descending, np.uint8)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    both = np.array(values + values[::-1])
    blocks = np.stack([block, block])[None]  # [1 row, 2 blocks, 16]
    weights = dequantize_mxfp4(blocks, np.array([[126, 129]], np.uint8))
    np.testing.assert_array_equal(weights, np.concatenate([both / 2, both * 4])[None])


def test_mxfp4_extreme_scales() -> None:
    ones = np.full((2, 16), 0x22, np.uint8)
    weights = dequantize_mxfp4(ones, np.array([0, 254], np.uint8))
    np.testing.assert_array_equal(weights, [2.0**-127] * 32 + [2.0**127] * 32)


def test_q8_rounds_ties_to_even() -> None:
    x = np.zeros(64, np.float32)
    x[:8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -126.5]
    x[32:36] = [-254, 1, 3, 5]  # the scale is 2, so that halves occur again
    q, scale = quantize_q8(x)
    np.testing.assert_array_equal(scale, np.array([1, 2], np.float32))
    np.testing.assert_array_equal(q[:8], [127, 0, 2, 2, 0, -2, -2, -126])
    np.testing.assert_array_equal(q[32:36], [-127, 0, 2, 2])
    assert q.dtype == np.int8 and scale.dtype == np.float32


@pytest.mark.parametrize("largest", [0.0, 1e-45, 2.66e-43, 1e-36, 1e38])
def test_q8_zero_and_extreme_blocks(largest: float) -> None:
    x = np.full((3, 32), largest, np.float32)
    x[:, 1::2] *= -1
    q, scale = quantize_q8(x)
    assert np.isfinite(scale).all() and np.abs(q.astype(int)).max() <= 127
    if largest >= 1e-36:  # the scale is normal, so that the largest input is met
        np.testing.assert_allclose(dequantize_q8(q, scale), x, rtol=1e-6)
    if largest == 0:
        assert not q.any() and not scale.any()


def test_q8_error_is_at_most_half_a_step() -> None:
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    q, scale = quantize_q8(x)
    error = np.abs(dequantize_q8(q, scale) - x).reshape(5, 3, 32).max(axis=-1)
    assert (error <= scale * 0.50001).all()


def test_bfloat16_bits_equal_bfloat16() -> None:
    values = np.array([1, -2.5, 3.140625, 0, 1e-30]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(to_float64(values.view(np.uint16)), to_float64(values))
    assert to_float64(values)[2] == 3.140625


# --- RoPE with YaRN ---------------------------------------------------------------------------


def test_yarn_numbers_of_gpt_oss() -> None:
    assert yarn_range(64, 150000, GPT_OSS_YARN) == pytest.approx(
        (8.092779115512402, 17.39802450158856), rel=1e-14
    )
    inv_freq, concentration = yarn_inv_freq(64, 150000, GPT_OSS_YARN)
    plain, _ = yarn_inv_freq(64, 150000, None)
    assert concentration == pytest.approx(1.3465735902799727, rel=1e-15)
    assert inv_freq.shape == (32,) and inv_freq[0] == 1
    np.testing.assert_allclose(inv_freq[:9], plain[:9])
    np.testing.assert_allclose(inv_freq[18:], plain[18:] / 32)
    assert plain[31] == pytest.approx(150000 ** (-62 / 64))


def short_context(context: int, truncate: bool) -> dict[str, Any]:
    changes = {"original_max_position_embeddings": context, "truncate": truncate}
    return GPT_OSS_YARN | changes


def test_yarn_truncate_defaults_to_true_as_in_transformers() -> None:
    without = {key: value for key, value in GPT_OSS_YARN.items() if key != "truncate"}
    assert yarn_range(64, 150000, without) == (8, 18)
    truncated, _ = yarn_inv_freq(64, 150000, without)
    exact, _ = yarn_inv_freq(64, 150000, GPT_OSS_YARN)
    assert np.abs(truncated / exact - 1).max() > 0.7


@pytest.mark.parametrize(("context", "truncate"), YARN_OF_SHORT_CONTEXTS)
def test_yarn_bounds_are_clamped(context: int, truncate: bool) -> None:
    bounds, expected = YARN_OF_SHORT_CONTEXTS[context, truncate]
    scaling = short_context(context, truncate)
    assert yarn_range(64, 150000, scaling) == pytest.approx(bounds, rel=1e-14)
    inv_freq, _ = yarn_inv_freq(64, 150000, scaling)
    assert inv_freq[[1, 5, 31]] == pytest.approx(expected, rel=1e-13)


def test_yarn_upper_bound_is_clamped() -> None:
    """Unclamped, 83.6: a small theta turns the last dimension often within a long context."""
    scaling = short_context(1 << 20, False) | {"beta_fast": 1e5}
    assert yarn_range(64, 100, scaling) == pytest.approx((3.5587207187441425, 63))


def test_yarn_bounds_that_meet() -> None:
    """Both are 0: the first dimension is as trained, the others are divided by the factor."""
    scaling = short_context(6, True)
    assert yarn_range(64, 150000, scaling) == (0, 0)
    inv_freq, _ = yarn_inv_freq(64, 150000, scaling)
    plain, _ = yarn_inv_freq(64, 150000, None)
    np.testing.assert_allclose(inv_freq, plain / np.array([1, *[32] * 31]), rtol=1e-15)


def test_rope_rotates_half_split_pairs() -> None:
    x = np.zeros((1, 1, 8))
    x[0, 0, 1] = 1  # its partner is 1 + 8/2
    turned = apply_rope(x, [3], np.array([9.0, math.pi / 6, 9.0, 9.0]), 2.0)
    expected = np.zeros(8)
    expected[5] = 2  # a quarter turn (3 * pi/6), times the concentration
    np.testing.assert_allclose(turned[0, 0], expected, atol=1e-15)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 64))
    rope = yarn_inv_freq(64, 150000, GPT_OSS_YARN)

    def score(query_at: int, key_at: int) -> float:
        return float(np.sum(apply_rope(q, [query_at], *rope) * apply_rope(k, [key_at], *rope)))

    assert score(100, 60) == pytest.approx(score(5040, 5000), rel=1e-9)
    assert score(100, 60) != pytest.approx(score(100, 61), rel=1e-3)


# --- Attention --------------------------------------------------------------------------------


def test_attention_one_key_shares_with_the_sink() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1, 64))
    sink = 0.7
    weight = math.exp(float(np.sum(q * k)) / 8)
    out = attention(q, k, v, np.array([sink]), None)
    np.testing.assert_allclose(out, v * weight / (weight + math.exp(sink)), rtol=1e-12)


def test_attention_large_scores_do_not_overflow() -> None:
    q = k = np.full((1, 1, 64), 100.0)
    for sink, expected in ((0.0, 1.0), (80000.0, 0.5), (1e6, 0.0)):
        assert attention(q, k, np.ones((1, 1, 64)), np.array([sink]), None)[0, 0, 0] == expected


@pytest.mark.parametrize("num_tokens", [127, 128, 129, 300])
def test_window_of_128_keys_includes_the_query_itself(num_tokens: int) -> None:
    """Scores are equal, so that the output is the mean of the values seen."""
    zeros = np.zeros((num_tokens, 1, 64))
    v = np.arange(num_tokens, dtype=np.float64)[:, None, None] ** 2 * np.ones(64)
    last = attention(zeros, zeros, v, NO_SINK, 128)[-1, 0, 0]
    assert last == pytest.approx(np.mean(np.arange(num_tokens)[-128:] ** 2.0))
    everything = attention(zeros, zeros, v, NO_SINK, None)[-1, 0, 0]
    assert everything == pytest.approx(np.mean(np.arange(num_tokens) ** 2.0))


def test_attention_neighbouring_heads_share_a_kv_head() -> None:
    v = np.array([1.0, 2.0])[None, :, None] * np.ones((1, 2, 64))
    out = attention(np.zeros((1, 8, 64)), np.zeros((1, 2, 64)), v, np.full(8, -np.inf), None)
    np.testing.assert_array_equal(out[0, :, 0], [1, 1, 1, 1, 2, 2, 2, 2])


def test_attention_of_late_queries_equals_rows_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((50, 4, 16))
    k, v = rng.standard_normal((2, 50, 2, 16))
    sinks = rng.standard_normal(4)
    full = attention(q, k, v, sinks, 10)
    np.testing.assert_allclose(attention(q[30:], k, v, sinks, 10), full[30:], rtol=1e-12)
    # Keys in the order of a ring buffer, with their positions:
    ring = np.roll(np.arange(21, 50), 5)
    late = attention(q[30:], k[ring], v[ring], sinks, 10, np.arange(30, 50), ring)
    np.testing.assert_allclose(late, full[30:], rtol=1e-12)
    monkeypatch.setattr(reference, "QUERY_ROWS", 7)
    np.testing.assert_allclose(attention(q, k, v, sinks, 10), full, rtol=1e-12)


# --- Norm and mixture of experts --------------------------------------------------------------


def test_rms_norm_by_hand() -> None:
    out = rms_norm(np.array([3.0, 4.0]), np.array([1.0, 10.0]), 0.5)  # mean square 12.5
    np.testing.assert_allclose(out, np.array([3, 40]) / math.sqrt(13))


def test_swiglu_clamps_gate_above_and_up_on_both_sides() -> None:
    gate = np.array([100.0, 7.0, 1.0, 1.0, -100.0, -8.0])
    up = np.array([100.0, 7.0, -100.0, -7.0, 0.0, 0.0])
    out = swiglu(gate, up, 7.0)
    assert out[0] == out[1] == pytest.approx(56 / (1 + math.exp(-1.702 * 7)))
    assert out[2] == out[3] == pytest.approx(-6 / (1 + math.exp(-1.702)))
    assert out[4] == 0  # exp(170) did not overflow
    assert out[5] == pytest.approx(-8 / (1 + math.exp(1.702 * 8)), rel=1e-6)  # not clamped to -7


def test_route_softmax_follows_the_choice() -> None:
    logits = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0], [1.0, 9.0, 9.0, 1.0]])
    ids, weights = route(logits, 2)
    assert ids.tolist() == [[1, 3], [0, 1], [1, 2]]  # by falling logit; a tie goes to the lowest id
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert weights[0, 0] == pytest.approx(math.e / (math.e + 1))


def test_route_ties_among_128_experts_go_to_the_lowest_ids() -> None:
    """gpt-oss-120b has as many; an unstable sort keeps the order of fewer by luck."""
    logits = np.zeros((1, 128))
    logits[0, 5::7] = 2.0
    ids, weights = route(logits, 4)
    assert ids.tolist() == [[5, 12, 19, 26]]
    np.testing.assert_allclose(weights, 0.25)


def test_moe_equals_the_sum_over_each_tokens_experts() -> None:
    rng = np.random.default_rng(0)
    tokens, hidden, inner, experts = 9, 8, 6, 5
    h = rng.standard_normal((tokens, hidden))
    gate_up, gate_up_bias = rng.standard_normal((experts, 2 * inner, hidden)), np.ones((5, 12))
    down = rng.standard_normal((experts, hidden, inner))
    down_bias = rng.standard_normal((experts, hidden))
    logits = rng.standard_normal((tokens, experts))
    logits[:, 3] = -9  # no token chooses it
    ids, weights = route(logits, 2)
    out = moe(h, ids, weights, gate_up, gate_up_bias, down, down_bias, 7.0)
    for t in range(tokens):
        expected: F64 = np.zeros(hidden)
        for e, weight in zip(ids[t], weights[t], strict=True):
            gate = np.minimum(gate_up[e, 0::2] @ h[t] + 1, 7)
            up = np.clip(gate_up[e, 1::2] @ h[t] + 1, -7, 7)
            inside = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            expected += weight * (down[e] @ inside + down_bias[e])
        np.testing.assert_allclose(out[t], expected, rtol=1e-12)
    assert 3 not in ids


# --- The whole model --------------------------------------------------------------------------


def test_logits_of_a_prefix_do_not_depend_on_what_follows() -> None:
    model = Model(*random_model(layers=2))
    ids = random_ids()
    np.testing.assert_allclose(model.logits(ids[:40]), model.logits(ids)[:40], rtol=1e-9)


def test_sliding_layers_forget_and_full_layers_do_not() -> None:
    """A token beyond the window changes nothing in a sliding layer, but it does in a full one."""
    ids = random_ids(20)
    other = [(ids[0] + 1) % 320, *ids[1:]]
    sliding = Model(*random_model(layers=1, window=16))
    change = np.abs(sliding.logits(ids) - sliding.logits(other)).max(axis=1)
    assert change[15] > 1e-3 and change[16:].max() < 1e-12
    both = Model(*random_model(layers=2, window=16))
    assert np.abs(both.logits(ids) - both.logits(other)).max(axis=1)[-1] > 1e-3


@pytest.mark.parametrize("field", [field.name for field in fields(Ablation)])
def test_every_ablation_changes_the_logits(field: str) -> None:
    """It changes them by at least ten times the tolerance of the profile `exact`."""
    config, tensors = random_model()
    expected = Model(config, tensors).logits(random_ids())
    wrong: dict[str, Any] = {field: 1 if field == "window_offset" else True}
    actual = Model(config, tensors, Ablation(**wrong)).logits(random_ids())
    assert relative_rms(actual, expected) > 1e-3
    assert kl_divergence(expected, actual) > 0


def test_random_model_exercises_what_it_should() -> None:
    config, tensors = random_model()
    trace: dict[str, F64] = {}
    logits = Model(config, tensors).logits(random_ids(), trace=trace)
    assert 1 < logits.std() < 10
    for layer in range(config["num_hidden_layers"]):
        assert len(np.unique(trace[f"layers.{layer}.expert_ids"])) == 8  # each expert has tokens
        at = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        weight = dequantize_mxfp4(tensors[at + "_blocks"], tensors[at + "_scales"])
        gate_up = np.einsum("th,eoh->teo", trace[f"layers.{layer}.moe_norm"], weight)
        assert 0.001 < np.mean(gate_up > 7) < 0.1


def test_dense_experts_and_bfloat16_bits_give_the_same_logits() -> None:
    config, tensors = random_model(layers=2)
    expected = Model(config, tensors).logits(random_ids())
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            weight = dequantize_mxfp4(tensor, tensors[name.replace("_blocks", "_scales")])
            dense[name.removesuffix("_blocks")] = weight.swapaxes(1, 2).astype(ml_dtypes.bfloat16)
        elif not name.endswith("_scales"):
            dense[name] = tensor.view(np.uint16)
    np.testing.assert_array_equal(Model(config, dense).logits(random_ids()), expected)


def test_rope_parameters_of_transformers_5_mean_the_same() -> None:
    config, tensors = random_model(layers=1)
    newer = dict(config)
    newer["rope_parameters"] = {**newer.pop("rope_scaling"), "rope_theta": newer.pop("rope_theta")}
    expected, actual = Model(config, tensors).rope(), Model(newer, tensors).rope()
    np.testing.assert_array_equal(actual[0], expected[0])
    assert actual[1] == expected[1]


def test_checkpoint_survives_writing_and_reading(tmp_path: Path) -> None:
    config, tensors = random_model(layers=1)
    config_read, tensors_read = read_checkpoint(
        write_checkpoint(tmp_path / "tiny", config, tensors)
    )
    assert config_read == config and list(tensors_read) == list(tensors)
    for name, tensor in tensors.items():
        assert tensors_read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors_read[name], tensor)


def test_random_model_is_reproducible() -> None:
    _, first = random_model(seed=3, layers=1)
    _, second = random_model(seed=3, layers=1)
    _, third = random_model(seed=4, layers=1)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not any(np.array_equal(first[name], third[name]) for name in first)


# --- Measures ---------------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    assert relative_rms([1.0, 2.0, 2.0], [1.0, 2.0, 5.0]) == pytest.approx(math.sqrt(9 / 30))
    expected = np.log([[0.5, 0.5], [0.9, 0.1]])
    actual = np.log([[0.25, 0.75], [0.4, 0.6]]) + 11  # a constant per row changes nothing
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    second = 0.9 * math.log(9 / 4) + 0.1 * math.log(1 / 6)
    assert kl_divergence(expected, actual) == pytest.approx((first + second) / 2)
    assert kl_divergence(expected, expected) == 0
    assert top1_agreement([[1, 2], [3, 1], [0, 5]], [[0, 9], [1, 2], [0, 1]]) == pytest.approx(
        2 / 3
    )
