"""Synthetic weights are the same however they are cut, and scaled like a model that works."""

import dataclasses
import hashlib
import math

import ml_dtypes
import numpy as np
import pytest

from osscompile.errors import CheckpointError
from osscompile.importer.checkpoint import canonical_shapes
from osscompile.importer.synthetic import TINY, SyntheticSource, synthetic_source

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantised(source: SyntheticSource, name: str, expert: int) -> np.ndarray:
    """Return float64 [..., rows, inputs] of one expert."""
    blocks = source.read(f"{name}.blocks", expert, expert + 1)[0]
    scales = source.read(f"{name}.scales", expert, expert + 1)[0].astype(int)
    values = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1)
    values = values.reshape(*blocks.shape[:-1], 32) * np.exp2(scales - 127)[..., None]
    return values.reshape(*blocks.shape[:-2], -1)


def normed_inputs(config_hidden: int, count: int) -> np.ndarray:
    """Return inputs as RMSNorm gives them: unit rms times norm weights from 0.5 to 2."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((count, config_hidden))
    values /= np.sqrt(np.mean(values**2, axis=1, keepdims=True))
    return values * np.exp2(generator.uniform(-1, 1, config_hidden))


@pytest.mark.parametrize("name", canonical_shapes(TINY))
def test_rows_do_not_depend_on_the_cut(name: str) -> None:
    source = SyntheticSource(TINY, seed=3)
    shape, dtype = canonical_shapes(TINY)[name]
    whole = source.read(name, 0, shape[0])
    assert whole.shape == source.shape(name) == shape
    assert whole.dtype == (ml_dtypes.bfloat16 if dtype == "bf16" else np.uint8)
    assert whole.flags.c_contiguous
    third = shape[0] // 3
    for start, stop in ((0, third), (third, shape[0]), (shape[0] - 1, shape[0]), (third, third)):
        np.testing.assert_array_equal(source.read(name, start, stop), whole[start:stop])


@pytest.mark.parametrize("name", ["embed.weight", "layers.23.down.blocks", "layers.0.qkv.weight"])
def test_cuts_inside_and_across_chunks(name: str) -> None:
    source = synthetic_source("gpt-oss-20b")
    row_bytes = source.read(name, 0, 1).nbytes
    chunk = max(1, (1 << 20) // row_bytes)
    start, stop = chunk // 2, chunk * 2 + 1
    whole = source.read(name, start, stop)
    for cut in range(start + 1, stop, max(1, chunk // 3)):
        halves = [source.read(name, start, cut), source.read(name, cut, stop)]
        np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_values_never_change_between_versions() -> None:
    """Measurements on synthetic models can only be compared if the weights stay the same."""
    digest = hashlib.blake2b(digest_size=8)
    for name, (shape, _) in canonical_shapes(TINY).items():
        digest.update(SyntheticSource(TINY).read(name, 0, shape[0]).tobytes())
    assert digest.hexdigest() == "c42e49728c32b472"


def test_seeds_and_names_give_other_values() -> None:
    values = [
        SyntheticSource(TINY, seed=0).read("layers.0.down.blocks", 0, 1),
        SyntheticSource(TINY, seed=1).read("layers.0.down.blocks", 0, 1),
        SyntheticSource(TINY, seed=0).read("layers.1.down.blocks", 0, 1),
        SyntheticSource(TINY, seed=0).read("layers.0.down.blocks", 1, 2),
    ]
    for index, one in enumerate(values):
        for other in values[:index]:
            assert np.mean(one == other) < 0.05


@pytest.mark.parametrize("name", ["gpt-oss-20b", "tiny"])
def test_rms_of_weights_and_scales(name: str) -> None:
    source = synthetic_source(name)
    config = source.config
    outputs = {"layers.1.qkv.weight": 1.0, "layers.1.router.weight": 1.5}
    inputs = normed_inputs(config.hidden_size, 200)
    for tensor, gain in outputs.items():
        rows = min(source.shape(tensor)[0], 500)
        weights = source.read(tensor, 0, rows).astype(float)
        spread = np.sqrt(np.mean((inputs @ weights.T) ** 2))
        assert gain / 1.4 < spread < gain * 1.4, tensor
    scales = source.read("layers.0.gate_up.scales", 0, 4)
    assert len(np.unique(scales)) == 4
    assert 64 < scales.min() and scales.max() < 192


@pytest.mark.parametrize("name", ["gpt-oss-20b", "tiny"])
def test_some_activations_pass_the_clamp(name: str) -> None:
    source = synthetic_source(name)
    inputs = normed_inputs(source.config.hidden_size, 64)
    gate, up = dequantised(source, "layers.0.gate_up", 2) @ inputs.T
    for values in (gate, up):
        assert 0.005 < np.mean(np.abs(values) > 7) < 0.2


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b", "tiny"])
def test_every_expert_is_chosen(name: str) -> None:
    source = synthetic_source(name)
    config = source.config
    inputs = normed_inputs(config.hidden_size, 2000)
    weights = source.read("layers.0.router.weight", 0, config.num_experts).astype(float)
    bias = source.read("layers.0.router.bias", 0, config.num_experts).astype(float)
    top = np.argsort(-(inputs @ weights.T + bias), axis=1)[:, : config.num_experts_per_token]
    shares = np.bincount(top.ravel(), minlength=config.num_experts) / top.size
    assert shares.min() > 0.3 / config.num_experts
    assert shares.max() < 3 / config.num_experts


def test_logits_are_neither_flat_nor_certain() -> None:
    source = SyntheticSource(dataclasses.replace(TINY, vocab_size=20_000))
    logits = normed_inputs(64, 20) @ source.read("lm_head.weight", 0, 20_000).astype(float).T
    assert 1.5 < logits.std() < 4
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    entropy = -(chances * np.log(chances)).sum(axis=1).mean()
    assert 0.4 < entropy / math.log(20_000) < 0.9


def test_small_tensors_are_not_trivial() -> None:
    source = synthetic_source("gpt-oss-20b")
    for kind in ("sinks", "qkv.bias", "out.bias", "router.bias", "down.bias", "gate_up.bias"):
        values = source.read(f"layers.0.{kind}", 0, 1 if kind.startswith("gate") else 32)
        values = values.astype(float)
        assert np.all(np.isfinite(values)) and np.all(values != 0), kind
        assert (values < 0).any() and (values > 0).any(), kind
    norm = source.read("layers.0.attn_norm.weight", 0, 2880).astype(float)
    assert norm.min() >= 0.5 and norm.max() < 2


def test_unknown_name() -> None:
    with pytest.raises(CheckpointError, match="expected one of gpt-oss-20b, gpt-oss-120b, tiny"):
        synthetic_source("gpt-4")
