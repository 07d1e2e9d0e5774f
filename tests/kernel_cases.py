"""Kernels, arguments and expected results that tests of kernels share.

A `Case` is one of each, made for a `Form`: for one token (decode) or for a symbolic number of them
(prefill). If no target runs on this machine, importing this module skips the importing module's
tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import reference
from kernel_runner import Array, Rule, build
from reference import F64, to_float64
from tvm.tirx import PrimFunc

from osscompile import targets
from osscompile.importer.graph import EXPERT_ROWS, TOKENS, WANTED
from osscompile.importer.weights import mxfp4_words
from osscompile.kernels import matmul, rows
from osscompile.kernels.quantize import quantize
from osscompile.runtime.machine import Machine
from osscompile.runtime.step import FEW, TILE_ROWS
from osscompile.schedules.formats import (
    FEW_EXPERT_ROWS,
    FEW_TOKENS,
    FP4_OFFSET,
    Index,
    is_few,
)
from osscompile.targets import Target

try:
    HERE = targets.of_this_machine()
except targets.TargetError as no_target:
    pytest.skip(str(no_target), allow_module_level=True)

RUNNABLE = [  # variants that this machine can run
    target
    for target in targets.load_variants(HERE.name)
    if set(target.cpu_features) <= set(Machine.here().cpu_features)
]
OTHERS = [target for target in RUNNABLE if target != HERE]  # all but the best
LIMIT = 7.0  # SwiGLU's clamp, as in gpt-oss
CLOSE = 2e-6  # relative rms: a sum of 2880 float32 products is off by less


@dataclass(frozen=True)
class Form:
    """The number of tokens: a kernel is built for `tokens`, and called with `count`."""

    name: str
    tokens: Index
    count: int

    def expert_rows(self, count: int) -> Index:
        if isinstance(self.tokens, int):
            return count
        return FEW_EXPERT_ROWS if is_few(self.tokens) else EXPERT_ROWS

    def __repr__(self) -> str:
        return self.name


DECODE = Form("decode", 1, 1)
PREFILL = Form("prefill", TOKENS, 21)
FORMS = [DECODE, Form("prefill_of_one", TOKENS, 1), PREFILL]
FEW_FORMS = [Form(f"few_{n}", FEW_TOKENS, n) for n in FEW if n > 1]
few_forms = pytest.mark.parametrize("form", FEW_FORMS, ids=repr)
every_form = pytest.mark.parametrize("form", FORMS, ids=repr)


@dataclass(frozen=True)
class Case:
    kernel: PrimFunc
    inputs: tuple[Array, ...]
    expected: F64  # the first result
    tolerance: float = CLOSE
    check_rest: Callable[..., None] | None = None  # called with all results, if there are several

    def check(self, target: Target = HERE, rule: Rule | None = None) -> None:
        results = build(self.kernel, target, rule=rule)(*self.inputs)
        first, *rest = results if isinstance(results, tuple) else (results,)
        assert_close(first, self.expected, self)
        if self.check_rest is not None:
            self.check_rest(first, *rest)
        assert bool(rest) == (self.check_rest is not None)


def assert_close(actual: Array, expected: Array, case: Case | float = CLOSE) -> None:
    """Check the rms, and every element to 10 times that; NaN and untouched outputs fail too."""
    tolerance = case.tolerance if isinstance(case, Case) else case
    assert actual.shape == expected.shape
    error = np.abs(actual - expected.astype(np.float64))
    rms = np.sqrt(np.mean(expected.astype(np.float64) ** 2))
    assert np.sqrt(np.mean(error**2)) <= tolerance * rms, np.sqrt(np.mean(error**2)) / rms
    assert error.max() <= 10 * tolerance * rms, error.max() / rms


# --- Numbers ----------------------------------------------------------------------------------


def numbers(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def bf16_bits(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return numbers(seed, *shape, scale=scale).astype(ml_dtypes.bfloat16).view(np.uint16)


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


def row_facts(positions: Array | int = 0, tables: Array | int = 0, ids: Array | int = 0) -> Array:
    """Return what a step is told of its rows [n, 3]."""
    facts = np.broadcast_arrays(ids, positions, tables)
    return np.stack([np.atleast_1d(f) for f in facts], axis=1).astype(np.int32)


def tiles_of(*counts: int) -> Array:
    """Return tiles [n, 2] of sequences that have so many rows each, one after the other."""
    tiles, first = [], 0
    for count in counts:
        tiles += [(first + i, min(TILE_ROWS, count - i)) for i in range(0, count, TILE_ROWS)]
        first += count
    return np.array(tiles, np.int32)


def q8_weights(seed: int, num_rows: int, inputs: int) -> tuple[Array, Array]:
    """Return codes [rows, blocks, 32] int8 with both extremes, scales [rows, blocks] float16."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (num_rows, inputs // 32, 32)).astype(np.int8)
    codes[0] = 127
    codes[1] = -127
    scales = rng.uniform(0.5, 2.0, codes.shape[:2]) / (70 * np.sqrt(inputs))
    return codes, scales.astype(np.float16)


def dequantized(codes: Array, scales: Array) -> F64:
    flat = codes.reshape(len(codes), -1)
    return reference.dequantize_q8(flat, scales.astype(np.float32))


def mxfp4_weights(seed: int, inputs: int, *shape: int) -> tuple[Array, Array]:
    """Return blocks [*shape, blocks, 16] and scales [*shape, blocks], for outputs of rms near 3."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape, inputs // 32, 16), dtype=np.uint8)
    scales = 127 - round(np.log2(np.sqrt(inputs))) + rng.integers(-2, 2, (*shape, inputs // 32))
    return blocks, scales.astype(np.uint8)


def activations(x: Array, kind: str) -> tuple[tuple[Array, ...], F64]:
    """Return the arguments of a kernel, and the numbers that they stand for."""
    if kind == "digits":
        digits, scales, offsets = build(quantize("digits", TOKENS, x.shape[-1]), HERE)(x)
        return (digits, scales, offsets), to_float64(x)
    codes, scales = reference.quantize_q8(x)
    blocks = codes.reshape(*scales.shape, 32)
    offsets = FP4_OFFSET * blocks.sum(axis=-1, dtype=np.int32)
    return (blocks, scales, offsets), reference.dequantize_q8(codes, scales)


# --- One token's row by itself ----------------------------------------------------------------


def embed_bf16(form: Form) -> Case:
    vocab, hidden = 40, 64
    weight = bf16_bits(1, vocab, hidden)
    ids = np.resize(int32(vocab - 1, 0, 7, 7, 21), form.count)
    kernel = rows.embed_bf16(form.tokens, vocab, hidden)
    return Case(kernel, (row_facts(ids=ids), weight), to_float64(weight[ids]), tolerance=0)


def embed_q8(form: Form) -> Case:
    vocab, hidden = 40, 64
    codes, scales = q8_weights(2, vocab, hidden)
    scales[7, 0] = 2.0**-24  # the smallest float16
    ids = np.resize(int32(vocab - 1, 0, 7, 7, 21), form.count)
    kernel = rows.embed_q8(form.tokens, vocab, hidden)
    expected = dequantized(codes, scales)[ids]
    return Case(kernel, (row_facts(ids=ids), codes.view("<u4"), scales), expected, tolerance=0)


def rms_norm(form: Form, hidden: int = 96) -> Case:
    x, weight = numbers(3, form.count, hidden), numbers(4, hidden)
    expected = reference.rms_norm(to_float64(x), to_float64(weight), 1e-5)
    kernel = rows.rms_norm(form.tokens, hidden, 1e-5)
    return Case(kernel, (x, weight), expected)


def take_rows(form: Form) -> Case:
    x = numbers(5, 21, 64)
    wanted = np.resize(int32(20, 0, 7, 7), form.count)
    return Case(rows.take_rows(TOKENS, WANTED, 64), (x, wanted), x[wanted], tolerance=0)


ROW_CASES = [embed_bf16, embed_q8, rms_norm, take_rows]


def check_quantize(form: Form, x: Array, target: Target = HERE, rule: Rule | None = None) -> None:
    """Check bit for bit, because the format of the profile `fast` is defined, not approximated."""
    (codes, scales, offsets), _ = activations(x, "q8")
    kernel = quantize("q8", form.tokens, x.shape[-1])
    actual_codes, actual_scales, actual_offsets = build(kernel, target, rule=rule)(x)
    np.testing.assert_array_equal(actual_scales, scales)
    np.testing.assert_array_equal(actual_codes, codes)
    np.testing.assert_array_equal(actual_offsets, offsets)


# --- RoPE -------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CONTEXT = 4224  # beyond the 4096 positions before YaRN
YARN = {
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
INV_FREQ, CONCENTRATION = reference.yarn_inv_freq(HEAD_DIM, 150000.0, YARN)


def rope_of(context: int) -> Array:
    angles = np.arange(context)[:, None] * INV_FREQ
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * CONCENTRATION
    return pairs.astype(np.float32)


def split_qkv(qkv: Array, heads: int, kv_heads: int, head_dim: int) -> tuple[F64, F64, F64]:
    """[tokens, width] -> q, k, v [tokens, heads, head_dim]."""
    all_heads = qkv.reshape(-1, heads + 2 * kv_heads, head_dim)
    q, k, v = np.split(all_heads, [heads, heads + kv_heads], axis=1)
    return to_float64(q), to_float64(k), to_float64(v)


def new_qkv(seed: int, form: Form) -> Array:
    return numbers(seed, form.count, (HEADS + 2 * KV_HEADS) * HEAD_DIM)


def rotate_queries(form: Form, position: int = 11) -> Case:
    qkv = new_qkv(9, form)
    q, _, _ = split_qkv(qkv, HEADS, KV_HEADS, HEAD_DIM)
    at = position + np.arange(len(q))
    expected = reference.apply_rope(q, at, INV_FREQ, CONCENTRATION) / np.sqrt(HEAD_DIM)
    kernel = rows.rotate_queries(form.tokens, HEADS, KV_HEADS, HEAD_DIM, CONTEXT)
    return Case(kernel, (qkv, rope_of(CONTEXT), row_facts(at)), expected)


# --- Matrix products --------------------------------------------------------------------------


def dense_q8(
    form: Form, inputs: int = 96, num_rows: int = 64, bias: bool = True, residual: bool = True
) -> Case:
    x, values = activations(numbers(25, form.count, inputs), "q8")
    codes, scales = q8_weights(26, num_rows, inputs)
    extra, added = dense_extra(form, num_rows, bias, residual)
    expected = values @ dequantized(codes, scales).T + added
    kernel = matmul.dense_q8(form.tokens, inputs, num_rows, bias, residual)
    return Case(kernel, (*x, codes.view("<u4"), scales, *extra), expected)


def dense_bf16(
    form: Form, inputs: int = 96, num_rows: int = 64, bias: bool = True, residual: bool = True
) -> Case:
    x = numbers(27, form.count, inputs)
    weight = bf16_bits(28, num_rows, inputs, scale=inputs**-0.5)
    extra, added = dense_extra(form, num_rows, bias, residual)
    expected = to_float64(x) @ to_float64(weight).T + added
    kernel = matmul.dense_bf16(form.tokens, inputs, num_rows, bias, residual)
    return Case(kernel, (x, weight, *extra), expected)


def dense_extra(form: Form, num_rows: int, bias: bool, residual: bool) -> tuple[list[Array], F64]:
    extra = [numbers(29, num_rows)] if bias else []
    extra += [numbers(30, form.count, num_rows)] if residual else []
    return extra, sum((to_float64(e) for e in extra), np.zeros(1))


def row_experts(form: Form, num_experts: int) -> Array:
    """Return an expert per row, equal ones together but not sorted, some absent; decode has more
    than one too."""
    if form is DECODE:
        return int32(num_experts - 1, 0, 2, 2) % num_experts
    return np.repeat(int32(num_experts - 1, 0, 2) % num_experts, form.count)[: 2 * form.count + 1]


def moe_activations(form: Form, inputs: int, kind: str) -> tuple[tuple[Array, ...], F64]:
    return activations(numbers(31, len(row_experts(form, 8)), inputs), kind)


def moe_mxfp4_swiglu(
    form: Form,
    kind: str,
    inputs: int = 64,
    num_rows: int = 96,
    num_experts: int = 8,
    bias: Array | None = None,
) -> Case:
    x, values = moe_activations(form, inputs, kind)
    blocks, scales = mxfp4_weights(32, inputs, num_experts, 2, num_rows)
    bias = numbers(33, num_experts, 2, num_rows) if bias is None else bias
    row_expert = row_experts(form, num_experts)
    used = {e: reference.dequantize_mxfp4(blocks[e], scales[e]) for e in set(row_expert.tolist())}
    expected = np.stack(
        [
            reference.swiglu(*(row @ used[e][i].T + bias[e, i] for i in (0, 1)), LIMIT)
            for row, e in zip(values, row_expert.tolist(), strict=True)
        ]
    )
    tokens = form.expert_rows(len(row_expert))
    kernel = matmul.moe_mxfp4_swiglu(kind, tokens, num_experts, inputs, num_rows, LIMIT)
    inputs_of_kernel = (*x, mxfp4_words(blocks), scales, bias, row_expert)

    def check_quantized(out: Array, *quantized: Array) -> None:
        for actual, wanted in zip(quantized, activations(out, kind)[0], strict=True):
            np.testing.assert_array_equal(actual, wanted)

    return Case(kernel, inputs_of_kernel, expected, check_rest=check_quantized)


def moe_mxfp4_sum(
    form: Form,
    kind: str,
    inputs: int = 96,
    num_rows: int = 64,
    num_experts: int = 8,
    top_k: int = 4,
) -> Case:
    """The slots are arbitrary, so that a wrong one shows."""
    x, values = moe_activations(form, inputs, kind)
    blocks, scales = mxfp4_weights(34, inputs, num_experts, num_rows)
    bias = numbers(35, num_experts, num_rows)
    row_expert = row_experts(form, num_experts)
    used = {e: reference.dequantize_mxfp4(blocks[e], scales[e]) for e in set(row_expert.tolist())}
    expected = np.stack(
        [row @ used[e].T + bias[e] for row, e in zip(values, row_expert.tolist(), strict=True)]
    )
    rng = np.random.default_rng(23)
    slots = rng.integers(len(row_expert), size=(form.count, top_k), dtype=np.int32)
    weights = rng.dirichlet(np.ones(top_k), form.count).astype(np.float32)
    residual = numbers(24, form.count, num_rows)
    sums = to_float64(residual) + np.einsum("tkh,tk->th", expected[slots], to_float64(weights))

    def check_sums(out: Array, actual: Array) -> None:
        assert_close(actual, sums)

    tokens = form.expert_rows(len(row_expert))
    kernel = matmul.moe_mxfp4_sum(kind, form.tokens, tokens, num_experts, inputs, num_rows, top_k)
    weights_of_kernel = (mxfp4_words(blocks), scales, bias)
    rest = (row_expert, slots, weights, residual)
    return Case(kernel, (*x, *weights_of_kernel, *rest), expected, check_rest=check_sums)


def route_bf16(form: Form, inputs: int = 96, num_experts: int = 32, top_k: int = 4) -> Case:
    x = numbers(27, form.count, inputs)
    weight = bf16_bits(28, num_experts, inputs, scale=inputs**-0.5)
    bias = numbers(29, num_experts)
    expected = to_float64(x) @ to_float64(weight).T + to_float64(bias)
    kernel = matmul.route_bf16(form.tokens, inputs, num_experts, top_k)
    return Case(kernel, (x, weight, bias), expected, check_rest=check_choice)


def check_choice(logits: Array, places: Array, ids: Array, weights: Array) -> None:
    """Check what a router chose by its logits."""
    order = np.argsort(-to_float64(logits), axis=-1, kind="stable")
    np.testing.assert_array_equal(np.argsort(places, axis=-1), order)
    expected_ids, expected_weights = reference.route(to_float64(logits), ids.shape[-1])
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6, atol=1e-37)


def moe_mxfp4_swiglu_q8(form: Form, *sizes: int) -> Case:
    return moe_mxfp4_swiglu(form, "q8", *sizes)


def moe_mxfp4_swiglu_digits(form: Form, *sizes: int) -> Case:
    return moe_mxfp4_swiglu(form, "digits", *sizes)


def moe_mxfp4_sum_q8(form: Form, *sizes: int) -> Case:
    return moe_mxfp4_sum(form, "q8", *sizes)


def moe_mxfp4_sum_digits(form: Form, *sizes: int) -> Case:
    return moe_mxfp4_sum(form, "digits", *sizes)


OF_ANY_WIDTH = [dense_q8, dense_bf16, moe_mxfp4_sum_q8, moe_mxfp4_sum_digits, route_bf16]
MATMULS = [*OF_ANY_WIDTH, moe_mxfp4_swiglu_q8, moe_mxfp4_swiglu_digits]
every_matmul = pytest.mark.parametrize("case", MATMULS, ids=lambda case: case.__name__)
of_any_width = pytest.mark.parametrize("case", OF_ANY_WIDTH, ids=lambda case: case.__name__)
