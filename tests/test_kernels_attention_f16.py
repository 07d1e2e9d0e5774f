"""Attention of many tokens by matrix units that multiply float16, against the float64 reference: on
the stand-in for CUDA, whose matrix units multiply as a GPU's do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference
from cuda_device import H100
from kernel_cases import PREFILL, assert_close, row_facts, split_qkv
from kernel_runner import Rule
from metal_device import needs_gxx
from test_kernels_attention import (
    Layer,
    Sequences,
    check_steps_together,
    check_unseen,
    every_window,
)

from osscompile.importer.graph import TOKENS
from osscompile.kernels.attention import attention
from osscompile.schedules.gpu.attention_f16 import attention_f16
from osscompile.schedules.records import answering
from osscompile.schedules.rule import schedule

pytestmark = needs_gxx

# Weights have 11 bits. Queries of these tests have no more.
ROUNDED = 2e-4


def layer_of(window: int | None, rule: Rule | None = None, **sizes: int) -> Layer:
    sizes = {"heads": 16, "kv_heads": 2, "head_dim": 64} | sizes
    return Layer(window, "float16", target=H100, rule=rule, tolerance=ROUNDED, **sizes)


def check_prompt(layer: Layer, count: int, seed: int = 1) -> None:
    qkv = layer.tokens(seed, count)
    assert_close(layer.run(qkv, 0), layer.expected(qkv), ROUNDED)


@every_window
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130, 200])
def test_prompts_that_end_around_tiles_pages_and_the_window(window: int | None, count: int) -> None:
    check_prompt(layer_of(window), count, count)


@pytest.mark.parametrize("window", [1, 17, 64])
def test_windows_that_are_no_whole_pages(window: int) -> None:
    """Some rows of a tile see nothing of a page that others see."""
    check_prompt(layer_of(window), 140)


@every_window
@pytest.mark.parametrize("start", [62, 63, 64, 126, 127, 128])
def test_parts_that_begin_around_the_border_of_a_page(window: int | None, start: int) -> None:
    """The first row of the tile does not see the page's last key, or just does."""
    layer = layer_of(window)
    qkv = layer.tokens(start, start + 20)
    layer.append(qkv[:start], row_facts(np.arange(start)))
    assert_close(layer.run(qkv[start:], start), layer.expected(qkv)[start:], ROUNDED)


@every_window
def test_prompt_in_parts_and_one_more_token(window: int | None) -> None:
    layer_of(window).check_in_parts(18)


@every_window
def test_sequences_together(window: int | None) -> None:
    check_steps_together(layer_of(window, positions=4 * 192))


@every_window
def test_one_token_each_of_20_sequences(window: int | None) -> None:
    """They have 1 to 153 tokens before. Most warps have no row."""
    lengths = [2 + 8 * i for i in range(20)]
    sequences = Sequences(layer_of(window, positions=20 * 192), tuple(lengths), 3)
    sequences.check_step({i: length - 1 for i, length in enumerate(lengths)})
    sequences.check_step(dict.fromkeys(range(20), 1))


@every_window
def test_past_position_4096(window: int | None) -> None:
    layer = layer_of(window, heads=8, kv_heads=1, positions=4224)
    qkv = layer.tokens(13, 4130)
    layer.append(qkv[:4090], row_facts(np.arange(4090)))
    q, k, v = split_qkv(qkv, *layer.sizes)
    expected = reference.attention(q[4090:], k, v, layer.sinks, window)
    assert_close(layer.run(qkv[4090:], 4090), expected, ROUNDED)


@pytest.mark.parametrize(("bands", "stages"), [(1, 2), (2, 3)])
def test_numbers_of_bands_and_stages(bands: int, stages: int) -> None:
    def rule(function, target, _):  # type: ignore[no-untyped-def]
        return attention_f16(function, target, answering({"bands": bands, "stages": stages}))

    check_prompt(layer_of(None, rule), 330)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (12, 1), (40, 1)])
def test_query_heads_that_fill_warps_and_tiles_or_not(heads: int, kv_heads: int) -> None:
    check_prompt(layer_of(16, heads=heads, kv_heads=kv_heads), 37)


def test_heads_of_256_numbers() -> None:
    check_prompt(layer_of(None, heads=2, head_dim=256), 70)


def test_keys_that_are_not_seen_may_be_any_number() -> None:
    check_unseen(layer_of(16, positions=64), PREFILL)


@pytest.mark.parametrize("sink", [-1e4, -100.0, 0.0, 5.0])
def test_sinks_take_their_share(sink: float) -> None:
    layer = layer_of(16)
    layer.sinks[:] = sink
    check_prompt(layer, 24)


def test_sink_that_leaves_little() -> None:
    layer = layer_of(16)
    layer.sinks[:] = 50
    check_prompt(layer, 24)


def test_queries_are_rounded() -> None:
    """Scores of several units are off by 2^-12 of themselves."""
    layer = layer_of(None)
    qkv = layer.tokens(5, 70)
    qkv[:, : 16 * 64] *= np.float32(1.001)
    assert_close(layer.run(qkv, 0), layer.expected(qkv), 6e-4)


def test_a_huge_sink_gives_nothing() -> None:
    layer = layer_of(None)
    layer.sinks[1] = 1e4
    out = layer.run(layer.tokens(15, 20), 0)
    assert np.abs(out[:, 1]).max() < 1e-30 and np.abs(out[:, 0]).min() > 0


def test_scores_of_thousands_stay_finite() -> None:
    """One key takes everything, though a score is off by units."""
    layer = layer_of(None)
    qkv = layer.tokens(17, 100) * np.float32(64)
    out, expected = layer.run(qkv, 0), layer.expected(qkv)
    same = np.abs(out - expected).max(axis=-1) < 1e-2 * np.abs(expected).max()
    assert np.isfinite(out).all() and same.mean() > 0.9


@pytest.mark.parametrize(
    ("dtype", "lacking", "rule"),
    [
        ("float16", False, "attention_f16"),
        ("float32", False, "attention"),  # of the profile exact
        ("float16", True, "attention_tf32"),
    ],
)
def test_who_multiplies_float16(dtype: str, lacking: bool, rule: str) -> None:
    target = dataclasses.replace(H100, bf16_matrix=None) if lacking else H100
    kernel = attention(TOKENS, 64, 8, 64, 128, dtype)
    assert schedule(kernel, target).attrs["scheduled_by"] == rule
