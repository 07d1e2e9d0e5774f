"""Every kernel against the float64 reference, at the edges of what it may be given.

A `Case` is a kernel, arguments and what they must give. Cases run for one token (decode: one static
tile of 1) and for tiles of 8 tokens (prefill: a symbolic number of them), under the rules for this
machine, under the fallback rule and for vectors of other widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
import tvm
from kernel_runner import Array, Rule, build
from reference import F64, to_float64
from tvm import te
from tvm.tirx import PrimFunc

from osscompile import targets
from osscompile.importer import weights as importer_weights
from osscompile.importer.config import ModelConfig
from osscompile.importer.graph import EXPERT_TILES, TILES, build_graph
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.importer.weights import (
    mxfp4_words,
    pack_rows,
    q8_scales,
    quantize_q8,
    rope_table,
    weight_chunks,
)
from osscompile.kernels import attention, experts, matmul, rows
from osscompile.passes.pack_weights import PACKED_ROWS, pack_weights
from osscompile.schedules import formats
from osscompile.schedules.cpu.rows import rows as fallback
from osscompile.schedules.formats import Index
from osscompile.targets import Target

try:
    HERE = targets.of_this_machine()
except targets.TargetError as no_target:
    pytest.skip(str(no_target), allow_module_level=True)
NO_INT8_DOT = dataclasses.replace(HERE, int8_dot=None)
NARROW = dataclasses.replace(HERE, int8_dot=None, vector_bits=128)

LIMIT = 7.0  # of SwiGLU, as in gpt-oss
CLOSE = 2e-6  # relative rms: a sum of 2880 float32 products is off by less


@dataclass(frozen=True)
class Form:
    """How many tokens a kernel sees: `count` tiles; `tiles` is what the kernel is built for."""

    name: str
    tiles: Index
    tile: int
    count: int

    def expert_tiles(self, count: int) -> Index:
        return count if isinstance(self.tiles, int) else EXPERT_TILES

    def __repr__(self) -> str:
        return self.name


DECODE = Form("decode", 1, 1, 1)
PREFILL = Form("prefill", TILES, 8, 3)
FORMS = [DECODE, Form("one_tile", TILES, 8, 1), PREFILL]
every_form = pytest.mark.parametrize("form", FORMS, ids=repr)
both_dtypes = pytest.mark.parametrize("dtype", ["float16", "float32"])


@dataclass(frozen=True)
class Case:
    kernel: PrimFunc
    inputs: tuple[Array, ...]
    expected: F64
    tolerance: float = CLOSE

    def check(self, target: Target = HERE, rule: Rule | None = None) -> None:
        assert_close(build(self.kernel, target, rule=rule)(*self.inputs), self.expected, self)


def assert_close(actual: Array, expected: Array, case: Case | float = CLOSE) -> None:
    """In the rms, and every element within 10 times that; NaN and untouched outputs fail too."""
    tolerance = case.tolerance if isinstance(case, Case) else case
    assert actual.shape == expected.shape
    error = np.abs(actual - expected.astype(np.float64))
    rms = np.sqrt(np.mean(expected.astype(np.float64) ** 2))
    assert np.sqrt(np.mean(error**2)) <= tolerance * rms, np.sqrt(np.mean(error**2)) / rms
    assert error.max() <= 10 * tolerance * rms, error.max() / rms


def numbers(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def bf16_bits(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return numbers(seed, *shape, scale=scale).astype(ml_dtypes.bfloat16).view(np.uint16)


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


# --- One token's row by itself ----------------------------------------------------------------


def embed_bf16(form: Form) -> Case:
    vocab, hidden = 40, 64
    weight = bf16_bits(1, vocab, hidden)
    ids = np.resize(int32(vocab - 1, 0, 7, 7, 21), (form.count, form.tile))
    kernel = rows.embed_bf16(form.tiles, form.tile, vocab, hidden)
    return Case(kernel, (ids, weight), to_float64(weight[ids]), tolerance=0)


def embed_q8(form: Form) -> Case:
    vocab, hidden = 40, 64
    codes, scales = q8_weights(2, vocab, hidden)
    scales[7, 0] = 2.0**-24  # the smallest float16
    ids = np.resize(int32(vocab - 1, 0, 7, 7, 21), (form.count, form.tile))
    kernel = rows.embed_q8(form.tiles, form.tile, vocab, hidden)
    expected = dequantized(codes, scales)[ids]
    return Case(kernel, (ids, codes.view("<u4"), scales), expected, tolerance=0)


def rms_norm(form: Form, hidden: int = 96) -> Case:
    x, weight = numbers(3, form.count, form.tile, hidden), numbers(4, hidden)
    expected = reference.rms_norm(to_float64(x), to_float64(weight), 1e-5)
    kernel = rows.rms_norm(form.tiles, form.tile, hidden, 1e-5)
    return Case(kernel, (x, weight), expected)


def take_row(form: Form) -> Case:
    x = numbers(5, form.count, form.tile, 64)
    last = form.count * form.tile - 1
    kernel = rows.take_row(form.tiles, form.tile, 64)
    return Case(kernel, (x, int32(last)), x.reshape(1, -1, 64)[:, last:], tolerance=0)


def gather_rows(form: Form) -> Case:
    x = numbers(6, form.count, form.tile, 64)
    tokens = np.resize(np.arange(form.count * form.tile, dtype=np.int32)[::-1], (5, form.tile))
    kernel = rows.gather_rows(form.tiles, form.tile, 64, form.expert_tiles(5))
    return Case(kernel, (x, tokens), x.reshape(-1, 64)[tokens], tolerance=0)


ROW_CASES = [embed_bf16, embed_q8, rms_norm, take_row, gather_rows]


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


def check_quantize(form: Form, x: Array, target: Target = HERE, rule: Rule | None = None) -> None:
    """Bit for bit: the format of the profile `fast` is defined, not approximated."""
    codes, scales = reference.quantize_q8(x)
    codes = codes.reshape(*scales.shape, 32)
    kernel = rows.quantize_q8(form.tiles, form.tile, x.shape[-1])
    actual_codes, actual_scales, actual_sums = build(kernel, target, rule=rule)(x)
    np.testing.assert_array_equal(actual_scales, scales)
    np.testing.assert_array_equal(actual_codes, codes)
    np.testing.assert_array_equal(actual_sums, codes.astype(np.int32).sum(axis=-1))


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


# --- RoPE and the cache -----------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CONTEXT = 4224  # past the 4096 positions before YaRN
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
    """[tiles, tile, width] -> q, k, v [tokens, heads, head_dim]."""
    all_heads = qkv.reshape(-1, heads + 2 * kv_heads, head_dim)
    q, k, v = np.split(all_heads, [heads, heads + kv_heads], axis=1)
    return to_float64(q), to_float64(k), to_float64(v)


def new_qkv(seed: int, form: Form) -> Array:
    return numbers(seed, form.count, form.tile, (HEADS + 2 * KV_HEADS) * HEAD_DIM)


def rotate_queries(form: Form, position: int = 11) -> Case:
    qkv = new_qkv(9, form)
    q, _, _ = split_qkv(qkv, HEADS, KV_HEADS, HEAD_DIM)
    at = position + np.arange(len(q))
    expected = reference.apply_rope(q, at, INV_FREQ, CONCENTRATION) / np.sqrt(HEAD_DIM)
    kernel = rows.rotate_queries(form.tiles, form.tile, HEADS, KV_HEADS, HEAD_DIM, CONTEXT)
    shape = (form.count, form.tile, HEADS, HEAD_DIM)
    return Case(kernel, (qkv, rope_of(CONTEXT), int32(position)), expected.reshape(shape))


@every_form
@pytest.mark.parametrize("position", [0, 11, 4095, 4096, CONTEXT - 24])
def test_rotate_queries_up_to_the_last_position(form: Form, position: int) -> None:
    rotate_queries(form, position).check()


@every_form
@both_dtypes
@pytest.mark.parametrize("position", [0, 3, 31, 32, 47, 4095])
def test_append_kv_around_the_wrap_of_a_ring_of_32(form: Form, dtype: str, position: int) -> None:
    capacity = 32
    qkv = new_qkv(10, form)
    _, k, v = split_qkv(qkv, HEADS, KV_HEADS, HEAD_DIM)
    at = position + np.arange(len(k))
    rotated = reference.apply_rope(k, at, INV_FREQ, CONCENTRATION)
    keys = np.full((KV_HEADS, capacity // 8, HEAD_DIM, 8), 77.0, dtype)
    values = np.full((KV_HEADS, capacity, HEAD_DIM), 77.0, dtype)
    expected_keys, expected_values = keys.astype(np.float64), values.copy()
    for token, slot in enumerate(at % capacity):
        expected_keys[:, slot // 8, :, slot % 8] = rotated[token]
        expected_values[:, slot] = v[token].astype(dtype)
    kernel = attention.append_kv(
        form.tiles, form.tile, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, capacity, dtype
    )
    run = build(kernel, HERE)
    new_keys, new_values = run(keys, values, qkv, rope_of(CONTEXT), int32(position), in_place=2)
    np.testing.assert_array_equal(new_values, expected_values)  # also that no other slot changed
    rounding = 2.0**-11 if dtype == "float16" else 3e-7
    np.testing.assert_allclose(new_keys.astype(np.float64), expected_keys, rtol=rounding, atol=5e-7)


# --- Attention --------------------------------------------------------------------------------


class Layer:
    """An attention layer's cache and its kernels, fed with chunks of queries, keys and values.

    Keys come unrotated (the RoPE table says angle 0), and representable in the cache's type, so
    that the reference sees the same numbers.
    """

    def __init__(
        self,
        window: int | None,
        dtype: str = "float32",
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        capacity: int = 264,
    ) -> None:
        self.window, self.dtype = window, dtype
        self.sizes = (heads, kv_heads, head_dim)
        self.capacity, self.context = capacity, 8192
        shape = (kv_heads, capacity, head_dim)
        self.keys = np.zeros((kv_heads, capacity // 8, head_dim, 8), dtype)
        self.values = np.zeros(shape, dtype)
        self.rope = np.zeros((self.context, head_dim // 2, 2), np.float32)
        self.rope[..., 0] = 1
        self.sinks = np.linspace(-2, 3, heads).astype(np.float32)

    def tokens(self, seed: int, count: int) -> Array:
        """qkv [count, width] whose scores spread over several units."""
        heads, kv_heads, head_dim = self.sizes
        values = numbers(seed, count, (heads + 2 * kv_heads) * head_dim, scale=1.5)
        return values.astype(self.dtype).astype(np.float32)

    def run(self, qkv: Array, position: int, form: Form = PREFILL) -> Array:
        """Append the tokens [count, width], then attend: -> [count, heads, head_dim]."""
        heads, _, head_dim = self.sizes
        fill = -len(qkv) % form.tile  # what a last, part empty tile holds must not matter
        padded = np.concatenate([qkv, np.full((fill, qkv.shape[1]), 1e4, np.float32)])
        tiled = padded.reshape(-1, form.tile, qkv.shape[1])
        cache = (self.capacity, self.dtype)
        append = attention.append_kv(form.tiles, form.tile, *self.sizes, self.context, *cache)
        self.keys, self.values = build(append, HERE)(
            self.keys, self.values, tiled, self.rope, int32(position), in_place=2
        )
        attend = attention.attention(
            form.tiles, form.tile, *self.sizes, self.capacity, self.window, self.dtype
        )
        queries = tiled[..., : heads * head_dim].reshape(*tiled.shape[:2], heads, head_dim)
        queries = queries * np.float32(head_dim**-0.5)  # of a power of 4: exact
        out = build(attend, HERE)(queries, self.keys, self.values, self.sinks, int32(position))
        return out.reshape(len(padded), heads, head_dim)[: len(qkv)]

    def expected(self, qkv: Array) -> F64:
        """For all tokens from position 0 on."""
        q, k, v = split_qkv(qkv, *self.sizes)
        return reference.attention(q, k, v, to_float64(self.sinks), self.window)


every_window = pytest.mark.parametrize("window", [None, 128], ids=["full", "sliding"])


@every_window
@both_dtypes
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 127, 128, 129, 130, 200])
def test_attention_around_a_window_of_128(window: int | None, dtype: str, count: int) -> None:
    layer = Layer(window, dtype)
    qkv = layer.tokens(count, count)
    assert_close(layer.run(qkv, 0), layer.expected(qkv))


@every_window
@pytest.mark.parametrize("count", [1, 2, 126, 127, 128, 129, 136, 137])
def test_attention_of_one_more_token(window: int | None, count: int) -> None:
    layer = Layer(window)
    qkv = layer.tokens(count, count)
    if count > 1:
        layer.run(qkv[:-1], 0)
    assert_close(layer.run(qkv[-1:], count - 1, DECODE), layer.expected(qkv)[-1:])


@pytest.mark.parametrize("window", [1, 7, 8, 9, 16])
def test_attention_of_windows_that_are_no_whole_tiles(window: int) -> None:
    layer = Layer(window, capacity=48)
    qkv = layer.tokens(window, 32)
    assert_close(layer.run(qkv, 0), layer.expected(qkv))


@pytest.mark.parametrize(
    ("form", "heads", "kv_heads"),
    [
        *((PREFILL, *heads) for heads in ((2, 2), (4, 2), (6, 2), (8, 1), (12, 1))),
        *((DECODE, *heads) for heads in ((2, 2), (12, 1))),
    ],
    ids=repr,
)
def test_attention_with_1_2_3_8_and_12_query_heads_a_key(
    form: Form, heads: int, kv_heads: int
) -> None:
    layer = Layer(16, heads=heads, kv_heads=kv_heads, capacity=48)
    qkv = layer.tokens(heads, 21)
    split = 20 if form is DECODE else 13
    layer.run(qkv[:split], 0)
    assert_close(layer.run(qkv[split:], split, form), layer.expected(qkv)[split:])


def test_attention_with_the_heads_of_gpt_oss() -> None:
    layer = Layer(128, "float16", heads=64, kv_heads=8, head_dim=64, capacity=192)
    qkv = layer.tokens(64, 136)
    whole = layer.expected(qkv)
    assert_close(layer.run(qkv[:64], 0), whole[:64])
    assert_close(layer.run(qkv[64:128], 64), whole[64:128])
    assert_close(layer.run(qkv[128:135], 128), whole[128:135])
    assert_close(layer.run(qkv[135:], 135, DECODE), whole[135:])


@every_window
@both_dtypes
def test_attention_in_uneven_chunks_and_around_a_ring(window: int | None, dtype: str) -> None:
    """Padded tiles write huge tokens, which the next chunk replaces; a ring of 192 wraps twice."""
    layer = Layer(window, dtype, capacity=192 if window else 512)
    qkv = layer.tokens(12, 450)
    expected = layer.expected(qkv)
    start = 0
    for size in (64, 63, 1, 2, 61, 64, 5, 64, 9, 64, 53):
        out = layer.run(qkv[start : start + size], start)
        assert_close(out, expected[start : start + size])
        start += size
    assert start == len(qkv)


@every_window
def test_attention_past_position_4096(window: int | None) -> None:
    layer = Layer(window, "float16", heads=2, kv_heads=1, capacity=192 if window else 4352)
    qkv = layer.tokens(13, 4200)
    q, k, v = split_qkv(qkv, *layer.sizes)
    for start in range(0, 4160, 64):
        out = layer.run(qkv[start : start + 64], start)
    last = reference.attention(q[4096:4160], k[:4160], v[:4160], layer.sinks, window)
    assert_close(out, last)
    out = layer.run(qkv[4160:4200], 4160)
    assert_close(out, reference.attention(q[4160:], k, v, layer.sinks, window))


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_attention_does_not_see_keys_outside_the_window_or_after_it(form: Form) -> None:
    """Whatever lies in the slots of other positions, as long as it is a number."""
    window, position, count = 16, 37, 1 if form is DECODE else 8
    layer = Layer(window, "float16", capacity=64)
    qkv = layer.tokens(14, position + count)
    for start in range(0, position, 16):
        layer.run(qkv[start : min(start + 16, position)], start)
    visible = np.arange(position - window + 1, position + count) % layer.capacity
    hidden = np.setdiff1d(np.arange(layer.capacity), visible)
    layer.values[:, hidden] = 6e4
    layer.keys[:, hidden // 8, :, hidden % 8] = 3e4
    out = layer.run(qkv[position:], position, form)
    assert_close(out, layer.expected(qkv)[position:])


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_attention_with_a_huge_sink_gives_nothing(form: Form) -> None:
    layer = Layer(None)
    layer.sinks[1] = 1e4
    out = layer.run(layer.tokens(15, 1), 0, form)
    assert np.abs(out[:, 1]).max() < 1e-30 and np.abs(out[:, 0]).min() > 0


@pytest.mark.parametrize("sink", [-1e4, -100.0, 0.0, 50.0])
def test_attention_sinks_take_their_share(sink: float) -> None:
    layer = Layer(16, capacity=48)
    layer.sinks[:] = sink
    qkv = layer.tokens(16, 24)
    assert_close(layer.run(qkv, 0), layer.expected(qkv))


def test_attention_with_scores_far_apart() -> None:
    """Scores of hundreds: the running maximum jumps, and what was summed before vanishes."""
    layer = Layer(None)
    qkv = layer.tokens(17, 100) * np.float32(16)
    assert_close(layer.run(qkv, 0), layer.expected(qkv), 5e-5)  # e^score: a score of 1e3 is off by


# --- Routing ----------------------------------------------------------------------------------


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


def combine_experts(form: Form, top_k: int = 4) -> Case:
    """The y of a row names its slot, so that a wrong row shows."""
    expert_tiles = 4 if form is DECODE else form.count * top_k + 7
    y = numbers(22, expert_tiles, form.tile, 64)
    rng = np.random.default_rng(23)
    shape = (form.count, form.tile, top_k)
    slots = rng.permutation(expert_tiles * form.tile)[: np.prod(shape)].reshape(shape)
    weights = rng.dirichlet(np.ones(top_k), shape[:2]).astype(np.float32)
    residual = numbers(24, form.count, form.tile, 64)
    chosen = to_float64(y).reshape(-1, 64)[slots]
    expected = to_float64(residual) + np.sum(chosen * to_float64(weights)[..., None], axis=2)
    kernel = experts.combine_experts(
        form.tiles, form.tile, 64, form.expert_tiles(expert_tiles), top_k
    )
    return Case(kernel, (y, slots.astype(np.int32), weights, residual), expected)


@every_form
def test_combine_experts(form: Form) -> None:
    combine_experts(form).check()


# --- Matrix products --------------------------------------------------------------------------


def activations(x: Array, quantized: bool) -> tuple[tuple[Array, ...], F64]:
    """Arguments of a kernel, and the numbers that they stand for."""
    if not quantized:
        return (x,), to_float64(x)
    codes, scales = reference.quantize_q8(x)
    sums = codes.reshape(*scales.shape, 32).sum(axis=-1, dtype=np.int32)
    return (codes.reshape(*scales.shape, 32), scales, sums), reference.dequantize_q8(codes, scales)


def q8_weights(seed: int, num_rows: int, inputs: int) -> tuple[Array, Array]:
    """codes [rows, blocks, 32] int8 with both extremes, scales [rows, blocks] float16."""
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
    """blocks [*shape, blocks, 16] and scales [*shape, blocks], for outputs of an rms near 3."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape, inputs // 32, 16), dtype=np.uint8)
    scales = 127 - round(np.log2(np.sqrt(inputs))) + rng.integers(-2, 2, (*shape, inputs // 32))
    return blocks, scales.astype(np.uint8)


def dense_q8(
    form: Form, inputs: int = 96, num_rows: int = 64, bias: bool = True, residual: bool = True
) -> Case:
    x, values = activations(numbers(25, form.count, form.tile, inputs), True)
    codes, scales = q8_weights(26, num_rows, inputs)
    extra, added = dense_extra(form, num_rows, bias, residual)
    expected = values @ dequantized(codes, scales).T + added
    kernel = matmul.dense_q8(form.tiles, form.tile, inputs, num_rows, bias, residual)
    return Case(kernel, (*x, codes.view("<u4"), scales, *extra), expected)


def dense_bf16(
    form: Form, inputs: int = 96, num_rows: int = 64, bias: bool = True, residual: bool = True
) -> Case:
    x = numbers(27, form.count, form.tile, inputs)
    weight = bf16_bits(28, num_rows, inputs, scale=inputs**-0.5)
    extra, added = dense_extra(form, num_rows, bias, residual)
    expected = to_float64(x) @ to_float64(weight).T + added
    kernel = matmul.dense_bf16(form.tiles, form.tile, inputs, num_rows, bias, residual)
    return Case(kernel, (x, weight, *extra), expected)


def dense_extra(form: Form, num_rows: int, bias: bool, residual: bool) -> tuple[list[Array], F64]:
    extra = [numbers(29, num_rows)] if bias else []
    extra += [numbers(30, form.count, form.tile, num_rows)] if residual else []
    return extra, sum((to_float64(e) for e in extra), np.zeros(1))


def tile_experts(form: Form, num_experts: int) -> Array:
    """One an expert tile: more than one in decode too; not sorted, some experts absent."""
    count = 4 if form is DECODE else form.count
    return np.resize(int32(num_experts - 1, 0, 2, 2), count) % num_experts


def moe_activations(form: Form, inputs: int, quantized: bool) -> tuple[tuple[Array, ...], F64]:
    count = 4 if form is DECODE else form.count
    return activations(numbers(31, count, form.tile, inputs), quantized)


def moe_mxfp4_swiglu(
    form: Form,
    quantized: bool,
    inputs: int = 64,
    num_rows: int = 96,
    num_experts: int = 8,
    bias: Array | None = None,
) -> Case:
    x, values = moe_activations(form, inputs, quantized)
    blocks, scales = mxfp4_weights(32, inputs, num_experts, 2, num_rows)
    bias = numbers(33, num_experts, 2, num_rows) if bias is None else bias
    tile_expert = tile_experts(form, num_experts)
    used = {e: reference.dequantize_mxfp4(blocks[e], scales[e]) for e in set(tile_expert.tolist())}
    expected = np.stack(
        [
            reference.swiglu(*(tile @ used[e][i].T + bias[e, i] for i in (0, 1)), LIMIT)
            for tile, e in zip(values, tile_expert.tolist(), strict=True)
        ]
    )
    tiles = form.expert_tiles(len(tile_expert))
    kernel = matmul.moe_mxfp4_swiglu(
        quantized, tiles, form.tile, num_experts, inputs, num_rows, LIMIT
    )
    return Case(kernel, (*x, mxfp4_words(blocks), scales, bias, tile_expert), expected)


def moe_mxfp4(
    form: Form, quantized: bool, inputs: int = 96, num_rows: int = 64, num_experts: int = 8
) -> Case:
    x, values = moe_activations(form, inputs, quantized)
    blocks, scales = mxfp4_weights(34, inputs, num_experts, num_rows)
    bias = numbers(35, num_experts, num_rows)
    tile_expert = tile_experts(form, num_experts)
    used = {e: reference.dequantize_mxfp4(blocks[e], scales[e]) for e in set(tile_expert.tolist())}
    expected = np.stack(
        [tile @ used[e].T + bias[e] for tile, e in zip(values, tile_expert.tolist(), strict=True)]
    )
    tiles = form.expert_tiles(len(tile_expert))
    kernel = matmul.moe_mxfp4(quantized, tiles, form.tile, num_experts, inputs, num_rows)
    return Case(kernel, (*x, mxfp4_words(blocks), scales, bias, tile_expert), expected)


def moe_mxfp4_swiglu_q8(form: Form, *sizes: int) -> Case:
    return moe_mxfp4_swiglu(form, True, *sizes)


def moe_mxfp4_swiglu_f32(form: Form, *sizes: int) -> Case:
    return moe_mxfp4_swiglu(form, False, *sizes)


def moe_mxfp4_q8(form: Form, *sizes: int) -> Case:
    return moe_mxfp4(form, True, *sizes)


def moe_mxfp4_f32(form: Form, *sizes: int) -> Case:
    return moe_mxfp4(form, False, *sizes)


MATMULS = [
    dense_q8,
    dense_bf16,
    moe_mxfp4_swiglu_q8,
    moe_mxfp4_swiglu_f32,
    moe_mxfp4_q8,
    moe_mxfp4_f32,
]
every_matmul = pytest.mark.parametrize("case", MATMULS, ids=lambda case: case.__name__)


@every_form
@every_matmul
def test_matmul(case: Callable[..., Case], form: Form) -> None:
    case(form).check()


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
@pytest.mark.parametrize("case", [dense_q8, dense_bf16], ids=lambda case: case.__name__)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_dense_without_bias_or_residual(
    case: Callable[..., Case], form: Form, bias: bool, residual: bool
) -> None:
    case(form, bias=bias, residual=residual).check()


@every_matmul
def test_matmul_of_4_rows_does_not_fill_a_vector(case: Callable[..., Case]) -> None:
    case(DECODE, 64, 4).check()


@pytest.mark.parametrize("case", [dense_bf16, moe_mxfp4_swiglu_q8], ids=lambda case: case.__name__)
def test_matmul_of_12_rows_leaves_a_vector_half_empty(case: Callable[..., Case]) -> None:
    case(PREFILL, 64, 12).check()


@pytest.mark.parametrize("num_experts", [4, 5, 128])
@every_form
def test_router_of_any_number_of_experts(form: Form, num_experts: int) -> None:
    dense_bf16(form, 64, num_experts, residual=False).check()


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
@pytest.mark.parametrize("case", [dense_q8, moe_mxfp4_q8], ids=lambda case: case.__name__)
def test_matmul_of_one_block_and_one_vector(case: Callable[..., Case], form: Form) -> None:
    case(form, 32, 8).check()


@pytest.mark.parametrize("num_rows", [8 * 13, 8 * 25])
def test_matmul_row_groups_with_no_divisor_near_the_limit(num_rows: int) -> None:
    dense_q8(PREFILL, 32, num_rows).check()


@pytest.mark.parametrize("case", [dense_q8, dense_bf16], ids=lambda case: case.__name__)
def test_dense_of_2880_for_one_token(case: Callable[..., Case]) -> None:
    case(DECODE, 2880, 2880).check()


@pytest.mark.parametrize(
    "case", [moe_mxfp4_swiglu_q8, moe_mxfp4_q8], ids=lambda case: case.__name__
)
def test_expert_of_2880_for_one_token(case: Callable[..., Case]) -> None:
    case(DECODE, 2880, 2880, 1).check()


@pytest.mark.parametrize("case", [dense_q8, moe_mxfp4_swiglu_q8], ids=lambda case: case.__name__)
def test_matmul_of_2880_in_tiles(case: Callable[..., Case]) -> None:
    case(PREFILL, 2880, 192).check()


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_int8_products_at_their_extremes_do_not_overflow(form: Form) -> None:
    """127 x 127 and -127 x 127 in every place: pairs of them just fit in 16 bits."""
    shape = (form.count, form.tile, 64)
    x, values = activations(np.resize(np.float32([1, 1, -1]), shape), True)
    signs = np.resize(np.int8([[1], [-1], [1]]), (8, 64)) * np.resize(np.int8([1, 1, -1]), 64)
    codes = (signs * np.int8(127)).reshape(8, 2, 32)
    scales = np.full((8, 2), 2.0**-7, np.float16)
    kernel = matmul.dense_q8(form.tiles, form.tile, 64, 8, False, False)
    Case(kernel, (*x, codes.view("<u4"), scales), values @ dequantized(codes, scales).T).check()


@pytest.mark.parametrize("code", [0x77, 0xFF, 0x7F, 0x00, 0x88])
@pytest.mark.parametrize("sign", [1, -1])
def test_mxfp4_products_at_their_extremes_do_not_overflow(code: int, sign: int) -> None:
    """Every input +-127 and every weight +-6 (or +-0, with the offset 12 alone)."""
    x, values = activations(np.full((4, 1, 64), sign, np.float32), True)
    blocks = np.full((1, 8, 2, 16), code, np.uint8)
    scales, bias = np.full((1, 8, 2), 127, np.uint8), np.full((1, 8), 0.5, np.float32)
    weight = reference.dequantize_mxfp4(blocks[0], scales[0])
    kernel = matmul.moe_mxfp4(True, 4, 1, 1, 64, 8)
    inputs = (*x, mxfp4_words(blocks), scales, bias, int32(0, 0, 0, 0))
    Case(kernel, inputs, values @ weight.T + 0.5).check()


@pytest.mark.parametrize("quantized", [True, False], ids=["q8", "f32"])
def test_swiglu_clamps_beyond_7_and_survives_hugely_negative_gates(quantized: bool) -> None:
    """Biases push gate and up to +-1e4: every pair of signs, in every form of the vector."""
    bias = np.zeros((8, 2, 96), np.float32)
    bias[:, 0] = np.resize([1e4, -1e4, 1e4, -1e4, 0, 20, -4, 7], 96)
    bias[:, 1] = np.resize([1e4, 1e4, -1e4, -1e4, 0, -20, 20, -7], 96)
    case = moe_mxfp4_swiglu(PREFILL, quantized, bias=bias)
    expected = case.expected
    assert np.ptp(expected[..., 0::8]) == np.ptp(expected[..., 2::8]) == 0  # both are clamped
    out = build(case.kernel, HERE)(*case.inputs)
    for column in (0, 2, 4, 5, 6, 7):
        assert_close(out[..., column::8], expected[..., column::8], 1e-5)
    for column in (1, 3):
        assert np.abs(out[..., column::8]).max() < 1e-30


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


# --- Other schedules --------------------------------------------------------------------------


@every_matmul
def test_matmul_under_the_fallback_rule(case: Callable[..., Case]) -> None:
    case(PREFILL).check(rule=fallback)


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (dense_q8, DECODE),
        (dense_q8, PREFILL),
        (moe_mxfp4_swiglu_q8, DECODE),
        (moe_mxfp4_q8, PREFILL),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.name,
)
def test_matmul_without_int8_products(case: Callable[..., Case], form: Form) -> None:
    case(form).check(NO_INT8_DOT)


@every_matmul
def test_matmul_in_vectors_of_128_bits(case: Callable[..., Case]) -> None:
    case(DECODE, 64, 24).check(NARROW)


@pytest.mark.parametrize("case", [dense_q8, dense_bf16, moe_mxfp4_q8], ids=lambda c: c.__name__)
def test_matmul_of_tiles_in_vectors_of_128_bits(case: Callable[..., Case]) -> None:
    case(PREFILL, 64, 24).check(NARROW)


def test_matmul_rows_that_fill_narrow_vectors_only() -> None:
    dense_bf16(PREFILL, 64, 4).check(NARROW)
    dense_q8(DECODE, 64, 12).check(NARROW)


@pytest.mark.parametrize(
    "case", [*ROW_CASES, rotate_queries, combine_experts], ids=lambda case: case.__name__
)
def test_row_kernel_in_vectors_of_128_bits(case: Callable[[Form], Case]) -> None:
    case(PREFILL).check(NARROW)


def test_quantize_q8_in_vectors_of_128_bits() -> None:
    check_quantize(PREFILL, numbers(43, 3, 8, 96), NARROW)


# --- Weights: what numpy writes is what kernels read ------------------------------------------


def decode_mxfp4(words: Array, scales: Array) -> Array:
    """[blocks, 4] and [blocks] -> [blocks, 32] float32, through what every kernel reads with."""
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


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-4, 1e-2, 1.0, 1e3])
def test_quantized_weights_are_off_by_half_a_step_at_most(scale: float) -> None:
    """Clipping would be off by more. The scale is stored as float16: below 8e-6 as a subnormal."""
    weight = numbers(44, 64, 96, scale=scale).astype(ml_dtypes.bfloat16)
    weight[3, 32:64] = 0
    words, scales = quantize_q8(weight)
    steps = scales.astype(np.float64)[..., None]
    codes = words.view(np.int8).reshape(64, 3, 32)
    error = np.abs(codes * steps - weight.astype(np.float64).reshape(64, 3, 32))
    assert (error <= steps / 2).all()
    assert (codes[3, 1] == 0).all()
    np.testing.assert_array_equal(scales, q8_scales(weight))
    largest = np.abs(weight.astype(np.float64)).reshape(64, 3, 32).max(axis=-1)
    if scale >= 1e-2:  # no step is wasted either: rounding up costs one part in 1024
        assert (scales <= largest / 127 * (1 + 2**-10)).all()


def config_with(**rope: Any) -> ModelConfig:
    return dataclasses.replace(TINY, rope=dataclasses.replace(TINY.rope, **rope))


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_rope_table_is_that_of_yarn(truncate: bool, head_dim: int) -> None:
    positions = np.array([0, 1, 2, 127, 4095, 4096, 4097, 65536, 131071])
    config = dataclasses.replace(config_with(truncate=truncate), head_dim=head_dim)
    inv_freq, concentration = reference.yarn_inv_freq(
        head_dim, 150000.0, {**YARN, "truncate": truncate}
    )
    angles = positions[:, None] * inv_freq
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * concentration
    table = rope_table(config, positions)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-7)


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
        return [list(weight_chunks(p, source, packing.get(p.name))) for p in graph.weights]

    whole = pieces()
    assert {len(chunks) for chunks in whole} == {1}
    monkeypatch.setattr(importer_weights, "CHUNK_BYTES", 5000)
    for parameter, chunks, (tensor,) in zip(graph.weights, pieces(), whole, strict=True):
        assert len(chunks) > 1 or tensor.nbytes < 5000 * 32, parameter.name
        np.testing.assert_array_equal(np.concatenate(chunks), tensor, err_msg=parameter.name)
