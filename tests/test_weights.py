"""Weights and the RoPE table: kernels read what numpy writes."""

from __future__ import annotations

import dataclasses
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
import tvm
from kernel_cases import HERE, YARN, numbers
from kernel_runner import Array
from tvm import te

from osscompile.errors import CheckpointError
from osscompile.importer import weights as importer_weights
from osscompile.importer.config import ModelConfig
from osscompile.importer.graph import build_graph, weight_parameters
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.importer.weights import (
    mxfp4_words,
    pack_rows,
    q8_scales,
    quantize_q8,
    rope_table,
    weight_pieces,
)
from osscompile.passes.pack_weights import PACKED_ROWS, pack_weights
from osscompile.runtime.artifact import hash_file
from osscompile.runtime.manifest import Tensor
from osscompile.runtime.safetensors import map_tensors
from osscompile.schedules import formats
from osscompile.write import NUM_MAKERS, write_weights


def decode_mxfp4(words: Array, scales: Array) -> Array:
    """[blocks, 4] and [blocks] -> [blocks, 32] float32, by the expressions that kernels use."""
    words_of = te.placeholder((len(words), 4), "uint32", name="words")
    scales_of = te.placeholder((len(words),), "uint8", name="scales")

    def value(g: Any, k: Any) -> Any:
        code = formats.fp4_offset_by_12(words_of[g, k // 8], k % 8)
        unbiased = (code - formats.const(formats.FP4_OFFSET, "int32")).astype("float32")
        return unbiased * formats.half_e8m0_to_float32(scales_of[g])

    out = te.compute((len(words), 32), value, name="out")
    function = te.create_prim_func([words_of, scales_of, out])
    arguments = [
        tvm.runtime.tensor(a) for a in (words, scales, np.full((len(words), 32), np.nan, "f4"))
    ]
    tvm.compile(function, target=tvm.target.Target(HERE.tvm))(*arguments)
    return arguments[-1].numpy()


def test_mxfp4_every_byte_in_every_place_and_every_scale() -> None:
    blocks = np.resize(np.arange(256, dtype=np.uint8), (16 * 17, 16))
    blocks = np.stack([np.roll(block, i) for i, block in enumerate(blocks)])
    scales = np.resize(np.arange(1, 253, dtype=np.uint8), len(blocks))  # 253: 6 x 2^126 overflows
    expected = reference.dequantize_mxfp4(blocks, scales[:, None]).reshape(-1, 32)
    np.testing.assert_array_equal(decode_mxfp4(mxfp4_words(blocks), scales), expected)


def test_mxfp4_scale_0_is_at_least_nearly_0() -> None:
    blocks = np.resize(np.arange(256, dtype=np.uint8), (16, 16))
    decoded = decode_mxfp4(mxfp4_words(blocks), np.zeros(16, np.uint8))
    assert (
        np.abs(decoded - reference.dequantize_mxfp4(blocks, np.zeros((16, 1), "u1"))).max() < 4e-38
    )


@pytest.mark.parametrize(("axis", "lanes"), [(0, 4), (1, 8), (2, 8)])
def test_pack_rows_puts_neighbouring_rows_side_by_side(axis: int, lanes: int) -> None:
    tensor = np.arange(16 * 16 * 16 * 3).reshape(16, 16, 16, 3)
    packed = pack_rows(tensor, axis, lanes)
    for at in ((0, 0, 0, 0), (5, 9, 13, 2), (15, 15, 15, 1)):
        outer = [index // lanes if i == axis else index for i, index in enumerate(at)]
        assert packed[(*outer, at[axis] % lanes)] == tensor[at]
    assert packed.size == tensor.size


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-4, 1e-2, 1.0, 1e3])
def test_quantized_weights_are_off_by_half_a_step_at_most(scale: float, dtype: type) -> None:
    """Clipping would be off by more. The scale is a float16, and a subnormal below 8e-6."""
    weight = numbers(44, 64, 96, scale=scale).astype(dtype)
    weight[3, 32:64] = 0
    words, scales = quantize_q8(weight)
    steps = scales.astype(np.float64)[..., None]
    codes = words.view(np.int8).reshape(64, 3, 32)
    error = np.abs(codes * steps - weight.astype(np.float64).reshape(64, 3, 32))
    assert (error <= steps / 2).all()
    assert (codes[3, 1] == 0).all()
    np.testing.assert_array_equal(scales, q8_scales(weight))
    largest = np.abs(weight.astype(np.float64)).reshape(64, 3, 32).max(axis=-1)
    if scale >= 1e-2:  # no step is wasted either; rounding up costs one part in 1024
        assert (scales <= largest / 127 * (1 + 2**-10)).all()


def config_with(**rope: Any) -> ModelConfig:
    return dataclasses.replace(TINY, rope=dataclasses.replace(TINY.rope, **rope))


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("context", [6, 64, 128, 256, 4096])  # bounds are clamped below 256
def test_rope_table_is_that_of_yarn(truncate: bool, head_dim: int, context: int) -> None:
    positions = np.array([0, 1, 2, 127, 4095, 4096, 4097, 65536, 131071])
    config = config_with(truncate=truncate, original_context=context)
    config = dataclasses.replace(config, head_dim=head_dim)
    inv_freq, concentration = reference.yarn_inv_freq(
        head_dim,
        150000.0,
        {**YARN, "truncate": truncate, "original_max_position_embeddings": context},
    )
    angles = positions[:, None] * inv_freq
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * concentration
    table = rope_table(config, positions)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-7)


def test_rope_table_whose_upper_bound_is_clamped() -> None:
    config = config_with(theta=100.0, beta_fast=1e5, original_context=1 << 20)
    scaling = {**YARN, "beta_fast": 1e5, "original_max_position_embeddings": 1 << 20}
    inv_freq, concentration = reference.yarn_inv_freq(TINY.head_dim, 100.0, scaling)
    table = rope_table(config, np.array([1]))
    np.testing.assert_allclose(table[0, :, 0], np.cos(inv_freq) * concentration, atol=1e-7)


def test_rope_table_without_scaling_is_plain_rope() -> None:
    inv_freq, concentration = reference.yarn_inv_freq(TINY.head_dim, TINY.rope.theta, None)
    positions = np.array([0, 1, 131071])
    angles = positions[:, None] * inv_freq
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * concentration
    table = rope_table(config_with(factor=1.0), positions)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("profile", ["fast", "exact"])
def test_weights_are_the_same_in_however_many_pieces(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SyntheticSource(TINY)
    graph = build_graph(TINY, profile, 64, 64)
    layout = pack_weights(graph.module, HERE).attrs[PACKED_ROWS]
    packing = {
        name: tuple(int(i) for i in axis_and_lanes) for name, axis_and_lanes in layout.items()
    }

    def pieces() -> list[list[Array]]:
        return [
            [make() for make in weight_pieces(p, source, packing.get(p.name))]
            for p in graph.weights
        ]

    whole = pieces()
    assert {len(made) for made in whole} == {1}
    monkeypatch.setattr(importer_weights, "PIECE_BYTES", 5000)
    for parameter, made, (tensor,) in zip(graph.weights, pieces(), whole, strict=True):
        assert len(made) > 1 or tensor.nbytes < 5000 * 32, parameter.name
        np.testing.assert_array_equal(np.concatenate(made), tensor, err_msg=parameter.name)


def test_pieces_are_written_in_order_and_made_few_ahead(tmp_path: Path) -> None:
    sizes = {"a": 300, "b": 0, "c": 7}
    made: list[int] = []
    written: list[int] = []

    def make(name: str, index: int) -> Array:
        made.append(index)
        time.sleep(random.random() / 1000)
        return np.array([index % 251], np.uint8)

    def progress(count: int) -> None:
        written.append(count)
        assert len(made) - len(written) <= 2 * NUM_MAKERS

    tensors = tuple(Tensor(name, (size,), "uint8") for name, size in sizes.items())
    sha256 = write_weights(
        tmp_path / "weights",
        tensors,
        lambda t: [partial(make, t.name, index) for index in range(t.num_bytes)],
        progress,
    )
    assert sha256 == hash_file(tmp_path / "weights")
    found = map_tensors(tmp_path / "weights")
    for name, size in sizes.items():
        np.testing.assert_array_equal(found[name], np.arange(size) % 251, err_msg=name)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e7])
@pytest.mark.parametrize("part", ["words", "scales"])
def test_weights_that_int8_cannot_hold_are_refused(value: float, part: str) -> None:
    class Broken(SyntheticSource):
        def read(self, name: str, start: int, stop: int) -> np.ndarray:
            rows = super().read(name, start, stop).copy()
            rows[0, 5] = value
            return rows

    source = Broken(TINY)
    parameters = weight_parameters(source.config, "fast", 64)
    parameter = next(p for p in parameters if p.name == f"lm_head.{part}")
    with pytest.raises(CheckpointError, match=r"lm_head.weight, rows 0 to .*finite"):
        for make in weight_pieces(parameter, source, None):
            make()


@pytest.mark.parametrize("profile", ["fast", "exact"])
def test_nan_is_refused_in_whatever_is_read(profile: str) -> None:
    """An infinite bias passes: some switch an expert off by one."""

    class Broken(SyntheticSource):
        value = np.nan

        def read(self, name: str, start: int, stop: int) -> np.ndarray:
            rows = super().read(name, start, stop)
            if rows.dtype == np.uint8:
                return rows
            rows = rows.copy()
            rows.reshape(-1)[-1] = self.value
            return rows

    source = Broken(TINY)
    for parameter in build_graph(TINY, profile, 64, 64).weights:
        layer, _, part = parameter.name.rpartition(".")
        if (layer.endswith(("gate_up", "down")) and part != "bias") or parameter.name == "rope":
            continue
        with pytest.raises(CheckpointError, match=f"{layer}.*NaN"):
            for make in weight_pieces(parameter, source, None):
                make()
    source.value = -np.inf
    router = next(p for p in weight_parameters(TINY, profile, 64) if p.name.endswith("router.bias"))
    (make,) = weight_pieces(router, source, None)
    assert make().min() == -np.inf
