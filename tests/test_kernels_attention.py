"""RoPE, the cache and attention against the float64 reference: windows, pages, chunks, sinks."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from kernel_cases import (
    CLOSE,
    CONCENTRATION,
    CONTEXT,
    DECODE,
    HEAD_DIM,
    HEADS,
    HERE,
    INV_FREQ,
    KV_HEADS,
    OTHERS,
    PREFILL,
    Form,
    assert_close,
    every_form,
    new_qkv,
    numbers,
    rope_of,
    rotate_queries,
    row_facts,
    split_qkv,
    tiles_of,
)
from kernel_runner import Array, Rule, build
from reference import F64, to_float64

from osscompile.kernels import attention, kv_cache
from osscompile.runtime.kv_cache import KEYS_PER_TILE, PAGE_TOKENS
from osscompile.schedules.cpu.loops import loops
from osscompile.targets import Target

both_dtypes = pytest.mark.parametrize("dtype", ["float16", "float32"])

# --- RoPE and the cache -----------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("position", [0, 11, 4095, 4096, CONTEXT - 24])
def test_rotate_queries_up_to_the_last_position(form: Form, position: int) -> None:
    rotate_queries(form, position).check()


@every_form
@both_dtypes
@pytest.mark.parametrize("position", [0, 3, 63, 64, 79, 4095])
def test_append_kv_around_the_borders_of_pages(form: Form, dtype: str, position: int) -> None:
    check_append(form, dtype, position)


def check_append(form: Form, dtype: str, position: int, target: Target = HERE) -> None:
    qkv = new_qkv(10, form)
    _, k, v = split_qkv(qkv, HEADS, KV_HEADS, HEAD_DIM)
    at = position + np.arange(len(k))
    rotated = reference.apply_rope(k, at, INV_FREQ, CONCENTRATION)
    table = np.array([7, 2, 5], np.int32)[np.arange(CONTEXT // PAGE_TOKENS) % 3]
    shapes = kv_cache.page_shapes(KV_HEADS, HEAD_DIM)
    keys, values = (np.full((9, *shape), 77.0, dtype) for shape in shapes)
    expected_keys, expected_values = keys.astype(np.float64), values.copy()
    for token, where in enumerate(at):
        page, slot = table[where // PAGE_TOKENS], where % PAGE_TOKENS
        expected_keys[page, :, slot // KEYS_PER_TILE, :, slot % KEYS_PER_TILE] = rotated[token]
        expected_values[page, :, slot] = v[token].astype(dtype)
    kernel = kv_cache.append_kv(form.tokens, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, dtype)
    run = build(kernel, target)
    inputs = (qkv, rope_of(CONTEXT), row_facts(at), table)
    new_keys, new_values = run(keys, values, *inputs, in_place=2)
    np.testing.assert_array_equal(new_values, expected_values)  # also that no other slot changed
    rounding = 2.0**-11 if dtype == "float16" else 3e-7
    np.testing.assert_allclose(new_keys.astype(np.float64), expected_keys, rtol=rounding, atol=5e-7)


# --- Attention --------------------------------------------------------------------------------


class Layer:
    """An attention layer's cache and its kernels, fed with chunks of queries, keys and values.

    Keys are not rotated (the RoPE table says angle 0), and can be represented in the cache's type,
    so that the reference sees the same numbers.
    """

    def __init__(
        self,
        window: int | None,
        dtype: str = "float32",
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        positions: int = 272,
        target: Target = HERE,
        rule: Rule | None = None,
        tolerance: float = CLOSE,
    ) -> None:
        self.window, self.dtype, self.target, self.rule = window, dtype, target, rule
        self.tolerance = tolerance
        self.sizes = (heads, kv_heads, head_dim)
        self.context = 8192
        num_pages = -(-positions // PAGE_TOKENS) + 1  # one more may be read, but not used
        self.table = np.random.default_rng(num_pages).permutation(num_pages + 2).astype(np.int32)
        shapes = kv_cache.page_shapes(kv_heads, head_dim)
        self.keys, self.values = (np.zeros((num_pages + 2, *s), dtype) for s in shapes)
        self.rope = np.zeros((self.context, head_dim // 2, 2), np.float32)
        self.rope[..., 0] = 1
        self.sinks = np.linspace(-2, 3, heads).astype(np.float32)

    def tokens(self, seed: int, count: int) -> Array:
        """Return qkv [count, width] whose scores spread over several units."""
        heads, kv_heads, head_dim = self.sizes
        values = numbers(seed, count, (heads + 2 * kv_heads) * head_dim, scale=1.5)
        return values.astype(self.dtype).astype(np.float32)

    def run(self, qkv: Array, position: int, form: Form = PREFILL) -> Array:
        """Append the tokens [count, width], then attend -> [count, heads, head_dim]."""
        rows = row_facts(position + np.arange(len(qkv)))
        return self.step(qkv, rows, tiles_of(len(qkv)), form)

    def step(self, qkv: Array, rows: Array, tiles: Array, form: Form) -> Array:
        """Compute rows [count, width] of any sequences, as `run` does those of one."""
        heads, _, head_dim = self.sizes
        self.append(qkv, rows, form)
        attend = attention.attention(form.tokens, *self.sizes, self.window, self.dtype)
        queries = qkv[:, : heads * head_dim].reshape(len(qkv), heads, head_dim)
        queries = queries * np.float32(head_dim**-0.5)  # exact: head_dim is a power of 4
        kernel = build(attend, self.target, rule=self.rule)
        inputs = (queries, self.keys, self.values, self.sinks, rows, self.table)
        out = kernel(*inputs, *(() if isinstance(form.tokens, int) else (tiles,)))
        return out.reshape(len(qkv), heads, head_dim)

    def append(self, qkv: Array, rows: Array, form: Form = PREFILL) -> None:
        append = kv_cache.append_kv(form.tokens, *self.sizes, self.context, self.dtype)
        self.keys, self.values = build(append, self.target)(
            self.keys, self.values, qkv, self.rope, rows, self.table, in_place=2
        )

    def check_in_parts(self, seed: int) -> None:
        """Check 140 tokens, 20 at a time, and one more."""
        qkv = self.tokens(seed, 141)
        expected = self.expected(qkv)
        for start in range(0, 140, 20):
            out = self.run(qkv[start : start + 20], start)
            assert_close(out, expected[start : start + 20], self.tolerance)
        assert_close(self.run(qkv[140:], 140, DECODE), expected[140:], self.tolerance)

    def expected(self, qkv: Array) -> F64:
        """Return the reference's result for all tokens from position 0 on."""
        q, k, v = split_qkv(qkv, *self.sizes)
        return reference.attention(q, k, v, to_float64(self.sinks), self.window)


every_window = pytest.mark.parametrize("window", [None, 128], ids=["full", "sliding"])


@every_window
@both_dtypes
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 127, 128, 129, 130, 200])
def test_attention_around_a_window_of_128(window: int | None, dtype: str, count: int) -> None:
    layer = Layer(window, dtype)
    qkv = layer.tokens(count, count)
    assert_close(layer.run(qkv, 0), layer.expected(qkv))


@every_window
@pytest.mark.parametrize("count", [1, 2, 126, 127, 128, 129, 144, 145])
def test_attention_of_one_more_token(window: int | None, count: int) -> None:
    layer = Layer(window)
    qkv = layer.tokens(count, count)
    if count > 1:
        layer.run(qkv[:-1], 0)
    assert_close(layer.run(qkv[-1:], count - 1, DECODE), layer.expected(qkv)[-1:])


@pytest.mark.parametrize("window", [1, 8, 15, 16, 17])
def test_attention_of_windows_that_are_no_whole_tiles(window: int) -> None:
    layer = Layer(window, positions=48)
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
    layer = Layer(16, heads=heads, kv_heads=kv_heads, positions=48)
    qkv = layer.tokens(heads, 21)
    split = 20 if form is DECODE else 13
    layer.run(qkv[:split], 0)
    assert_close(layer.run(qkv[split:], split, form), layer.expected(qkv)[split:])


def test_attention_with_the_heads_of_gpt_oss() -> None:
    layer = Layer(128, "float16", heads=64, kv_heads=8, head_dim=64)
    qkv = layer.tokens(64, 136)
    whole = layer.expected(qkv)
    assert_close(layer.run(qkv[:64], 0), whole[:64])
    assert_close(layer.run(qkv[64:128], 64), whole[64:128])
    assert_close(layer.run(qkv[128:135], 128), whole[128:135])
    assert_close(layer.run(qkv[135:], 135, DECODE), whole[135:])


@every_window
@both_dtypes
def test_attention_in_uneven_chunks(window: int | None, dtype: str) -> None:
    layer = Layer(window, dtype, positions=512)
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
    layer = Layer(window, "float16", heads=2, kv_heads=1, positions=4352)
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
    check_unseen(Layer(16, "float16", positions=64), form)


def check_unseen(layer: Layer, form: Form) -> None:
    """The slots of other positions may hold any number, but not NaN."""
    position, count = 37, 1 if form is DECODE else 8
    qkv = layer.tokens(14, position + count)
    for start in range(0, position, 16):
        layer.run(qkv[start : min(start + 16, position)], start)
    assert layer.window is not None
    visible = np.arange(position - layer.window + 1, position + count)
    for page in range(len(layer.table)):
        for slot in range(PAGE_TOKENS):
            if page * PAGE_TOKENS + slot not in visible:
                layer.values[layer.table[page], :, slot] = 6e4
                at = slot // KEYS_PER_TILE, slice(None), slot % KEYS_PER_TILE
                layer.keys[layer.table[page], :, at[0], :, at[2]] = 3e4
    out = layer.run(qkv[position:], position, form)
    assert_close(out, layer.expected(qkv)[position:], layer.tolerance)


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_attention_with_a_huge_sink_gives_nothing(form: Form) -> None:
    layer = Layer(None)
    layer.sinks[1] = 1e4
    out = layer.run(layer.tokens(15, 1), 0, form)
    assert np.abs(out[:, 1]).max() < 1e-30 and np.abs(out[:, 0]).min() > 0


@pytest.mark.parametrize("sink", [-1e4, -100.0, 0.0, 50.0])
def test_attention_sinks_take_their_share(sink: float) -> None:
    layer = Layer(16, positions=48)
    layer.sinks[:] = sink
    qkv = layer.tokens(16, 24)
    assert_close(layer.run(qkv, 0), layer.expected(qkv))


def test_attention_with_scores_far_apart() -> None:
    """Scores are in the hundreds: the running maximum jumps, and earlier sums vanish."""
    layer = Layer(None)
    qkv = layer.tokens(17, 100) * np.float32(16)
    assert_close(layer.run(qkv, 0), layer.expected(qkv), 5e-5)  # e^score: a score of 1e3 is off by


@every_window
@both_dtypes
def test_attention_under_the_fallback_rule(window: int | None, dtype: str) -> None:
    layer = Layer(window, dtype, rule=loops)
    layer.check_in_parts(18)


@pytest.mark.parametrize("head_dim", [4, 12])
def test_attention_of_heads_that_do_not_fill_vectors(head_dim: int) -> None:
    layer = Layer(None, head_dim=head_dim, positions=32)
    qkv = layer.tokens(19, 20)
    expected = layer.expected(qkv)
    assert_close(layer.run(qkv, 0), expected)


@pytest.mark.parametrize("variant", OTHERS, ids=lambda target: target.variant)
@every_window
def test_attention_of_other_variants(window: int | None, variant: Target) -> None:
    sizes = {"heads": 16, "kv_heads": 2, "head_dim": 64}
    layer = Layer(window, "float16", target=variant, **sizes)
    layer.check_in_parts(20)


# --- Rows of several sequences ----------------------------------------------------------------

FOUR = Form("four_rows", 4, 4)


class Sequences:
    """Sequences in one cache, so many pages each, whose rows are computed together."""

    def __init__(self, layer: Layer, lengths: tuple[int, ...], pages_each: int) -> None:
        self.layer, self.pages_each = layer, pages_each
        self.qkv = [layer.tokens(i, length) for i, length in enumerate(lengths)]
        self.done = [0] * len(lengths)

    def share(self, first: int, second: int, count: int) -> None:
        """Let the second begin with tokens of the first that are computed: whole pages."""
        table, each = self.layer.table, self.pages_each
        pages = count // PAGE_TOKENS
        table[second * each : second * each + pages] = table[first * each : first * each + pages]
        self.qkv[second][:count] = self.qkv[first][:count]
        self.done[second] = count

    def check_step(self, counts: dict[int, int], form: Form = PREFILL) -> None:
        """Compute so many more tokens of some sequences, in this order."""
        parts = {i: slice(self.done[i], self.done[i] + n) for i, n in counts.items()}
        rows = [
            row_facts(np.arange(part.start, part.stop), i * self.pages_each)
            for i, part in parts.items()
        ]
        new = np.concatenate([self.qkv[i][part] for i, part in parts.items()])
        out = self.layer.step(new, np.concatenate(rows), tiles_of(*counts.values()), form)
        ends = np.cumsum(list(counts.values()))[:-1]
        for (i, part), result in zip(parts.items(), np.split(out, ends), strict=True):
            expected = self.layer.expected(self.qkv[i][: part.stop])
            assert_close(result, expected[part], self.layer.tolerance)
            self.done[i] = part.stop


def check_together(
    window: int | None, target: Target = HERE, dtype: str = "float16", rule: Rule | None = None
) -> None:
    check_steps_together(Layer(window, dtype, positions=4 * 192, target=target, rule=rule))


def check_steps_together(layer: Layer) -> None:
    """Chunks, single tokens and continued sequences at once; two begin with the same page."""
    sequences = Sequences(layer, (140, 110, 40, 70), 3)
    sequences.check_step({0: 100, 2: 1})
    sequences.share(0, 1, PAGE_TOKENS)
    sequences.check_step({0: 1, 1: 26, 2: 17, 3: 65})
    sequences.check_step({3: 1, 1: 1, 0: 1, 2: 1}, FOUR)
    sequences.check_step({2: 2, 0: 33, 1: 16})
    sequences.check_step({1: 1, 0: 1, 3: 1, 2: 1}, FOUR)
    assert sequences.done == [136, 108, 22, 67]


@every_window
@both_dtypes
def test_attention_of_sequences_together(window: int | None, dtype: str) -> None:
    check_together(window, dtype=dtype)


def test_attention_of_sequences_together_under_the_fallback_rule() -> None:
    check_together(16, rule=loops)


@every_window
def test_attention_of_64_sequences(window: int | None) -> None:
    """They have 1 to 64 tokens before."""
    sequences = Sequences(Layer(window, "float16", positions=64 * 128), tuple(range(2, 66)), 2)
    sequences.check_step({i: i + 1 for i in range(64)})
    sequences.check_step(dict.fromkeys(range(64), 1))


def test_attention_of_rows_of_one_sequence_in_a_step_for_few() -> None:
    sequences = Sequences(Layer(16, "float16"), (70, 70), 2)
    sequences.check_step({0: 60})
    sequences.check_step({0: 3, 1: 1}, FOUR)
    sequences.check_step({0: 4}, FOUR)


def test_the_same_row_twice_changes_nothing() -> None:
    """A step for few rows is filled up with one of its rows."""
    layer = Layer(None, "float16")
    qkv = layer.tokens(1, 66)
    layer.run(qkv[:64], 0)
    rows = row_facts(np.array([64, 65, 65, 65]))
    out = layer.step(qkv[[64, 65, 65, 65]], rows, tiles_of(4), FOUR)
    assert_close(out, layer.expected(qkv)[[64, 65, 65, 65]])
