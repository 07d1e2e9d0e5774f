"""The kernel that rotates, appends, attends and quantises for one token: against the float64
reference, and against the kernels that it joins."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_device import H100
from kernel_cases import CONTEXT, DECODE, HERE, Form, assert_close, row_facts
from kernel_runner import Array, build
from metal_device import needs_gxx
from test_kernels_attention import Layer, both_dtypes, every_window
from tvm.tirx import PrimFunc

from osscompile.kernels import attention, kv_cache, quantize, rows
from osscompile.passes.join_attention import join_kernels

pytestmark = needs_gxx
QUANTIZED = pytest.mark.parametrize("quantized", [False, True], ids=["float32", "q8"])


class StepLayer(Layer):
    """A layer of which one token is one kernel."""

    def __init__(self, window: int | None, dtype: str, quantized: bool, context: int) -> None:
        super().__init__(window, dtype, heads=6, kv_heads=2, head_dim=64)
        self.context, self.quantized = context, quantized

    def kernels(self) -> tuple[PrimFunc, PrimFunc, PrimFunc, PrimFunc]:
        shape = (1, *self.sizes)
        return (
            rows.rotate_queries(*shape, self.context),
            kv_cache.append_kv(*shape, self.context, self.dtype),
            attention.attention(*shape, self.window, self.dtype),
            quantize.quantize("q8", 1, self.sizes[0] * self.sizes[2]),
        )

    def step(self, qkv: Array, rows: Array, tiles: Array, form: Form) -> Array:
        if form is not DECODE:
            return super().step(qkv, rows, tiles, form)
        *parts, quantize = self.kernels()
        kernel = join_kernels(*parts, quantize if self.quantized else None)
        cached = (self.keys, self.values)
        inputs = (qkv, self.rope, rows, self.table, self.sinks)
        self.keys, self.values, *found = build(kernel, H100)(*cached, *inputs, in_place=2)
        out = found[0] if not self.quantized else found[0] * found[1][..., None]
        if self.quantized:
            np.testing.assert_array_equal(found[2], 12 * found[0].astype(np.int32).sum(axis=-1))
        return out.reshape(1, self.sizes[0], self.sizes[2])


@every_window
@both_dtypes
@QUANTIZED
def test_one_more_token(window: int | None, dtype: str, quantized: bool) -> None:
    """Around the borders of chunks and pages, and of the window; the first token sees itself."""
    for count in (1, 2, 32, 33, 34, 64, 65, 128, 129, 130, 257):
        layer = StepLayer(window, dtype, quantized, 8192)
        qkv = layer.tokens(count, count)
        if count > 1:
            layer.run(qkv[:-1], 0)
        found, expected = layer.run(qkv[-1:], count - 1, DECODE), layer.expected(qkv)[-1:]
        if quantized:
            steps = np.abs(expected).reshape(-1, 32).max(axis=1) / 127
            error = np.abs(found - expected).reshape(-1, 32).max(axis=1)
            assert (error <= 0.51 * steps).all()
        else:
            assert_close(found, expected)


@QUANTIZED
@pytest.mark.parametrize("position", [0, 63, 64, 150])
def test_the_same_as_the_kernels_that_it_joins(quantized: bool, position: int) -> None:
    """With rotation; and what it leaves in the cache is theirs."""
    layer = StepLayer(128, "float16", quantized, CONTEXT)
    angles = np.arange(CONTEXT)[:, None] * 150000.0 ** -np.linspace(0, 1, 32, endpoint=False)
    layer.rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    layer.keys[:], layer.values[:] = 0.25, -0.5
    before, facts = (layer.keys.copy(), layer.values.copy()), row_facts(np.array([position]))
    qkv = layer.tokens(7, 1)
    rotate, append, attend, _ = layer.kernels()
    queries = build(rotate, HERE)(qkv, layer.rope, facts)
    keys, values = build(append, HERE)(*before, qkv, layer.rope, facts, layer.table, in_place=2)
    expected = build(attend, HERE)(queries, keys, values, layer.sinks, facts, layer.table)
    found = layer.step(qkv, facts, np.zeros((1, 2), np.int32), DECODE).reshape(expected.shape)
    np.testing.assert_array_equal(layer.values, values)
    np.testing.assert_allclose(layer.keys.astype(float), keys.astype(float), rtol=1e-3, atol=1e-6)
    tolerance = 0.6 * np.abs(expected).max() / 127 if quantized else 2e-5
    assert np.abs(found - expected).max() < tolerance


@QUANTIZED
def test_the_joined_kernel_without_a_schedule(quantized: bool) -> None:
    """It is what the kernels are one after the other."""
    layer = StepLayer(8, "float32", quantized, 8192)
    *parts, last = layer.kernels()
    kernel = join_kernels(*parts, last if quantized else None)
    qkv, facts = layer.tokens(7, 1), row_facts(np.array([0]))
    inputs = (layer.keys, layer.values, qkv, layer.rope, facts, layer.table, layer.sinks)
    *_, found = build(kernel, HERE, scheduled=False)(*inputs, in_place=2)[:3]
    expected = layer.expected(qkv).reshape(-1)
    if quantized:
        scale = np.abs(expected).reshape(-1, 32).max(axis=1, keepdims=True) / 127
        np.testing.assert_allclose(found[0] * scale, expected.reshape(-1, 32), atol=scale.max())
    else:
        assert_close(found, expected[None])
