"""The sampler against a straightforward one that sorts everything in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from osscompile.runtime.errors import ArtifactError, InputError, OsscompileError
from osscompile.runtime.sampler import Limit, Sample, Sampler, reserved_ids, sample_rows
from osscompile.runtime.sampling_options import SamplingOptions

NO_IDS = np.empty(0, np.int64)
VOCAB = 1000  # not a whole number of blocks


def random_logits(seed: int, vocab: int = VOCAB, spread: float = 2.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)


def expected_probabilities(
    logits: NDArray[np.float32], options: SamplingOptions
) -> NDArray[np.float64]:
    """Apply temperature, top-k, top-p, min-p in this order, by sorting all; float64 [vocab]."""
    scaled = logits.astype(np.float64) / options.temperature
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled[order] - scaled.max())
    if options.top_k:
        probabilities[options.top_k :] = 0
    probabilities /= probabilities.sum()
    mass_before = np.cumsum(probabilities) - probabilities
    probabilities[mass_before >= options.top_p] = 0
    probabilities[probabilities < options.min_p * probabilities[0]] = 0
    result = np.zeros(logits.size)
    result[order] = probabilities / probabilities.sum()
    return result


def draw(
    logits: NDArray[np.float32], options: SamplingOptions, times: int, reserved: Any = NO_IDS
) -> NDArray[np.int64]:
    sampler = Sampler(options, reserved)
    return np.array([sampler.sample(logits).token_id for _ in range(times)])


def test_greedy_is_the_best_and_the_lowest_id_of_equals() -> None:
    logits = random_logits(0)
    assert draw(logits, SamplingOptions(temperature=0), 1) == logits.argmax()
    logits[[7, 500, 999]] = logits.max() + 1
    assert draw(logits, SamplingOptions(temperature=0), 1) == 7
    assert draw(logits, SamplingOptions(temperature=1.0, top_k=1), 1) == 7
    assert draw(logits, SamplingOptions(temperature=1e-9), 1) == 7


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(1)
    before = logits.copy()
    draw(logits, SamplingOptions(temperature=0.5, top_p=0.9, logprobs=3), 2, np.array([1, 2]))
    np.testing.assert_array_equal(logits, before)


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 2},
    {"top_k": 5},
    {"top_k": 300},  # more than there are blocks
    {"top_k": 5000},  # more than there are tokens
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 20, "min_p": 0.3},
    {"top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_distribution_matches_sorting_everything(filters: dict[str, Any]) -> None:
    options = SamplingOptions(**{"temperature": 1.0, "seed": 1, **filters})
    logits = random_logits(2, vocab=400)
    expected = expected_probabilities(logits, options)
    times = 2000
    counts = np.bincount(draw(logits, options, times), minlength=logits.size)
    assert counts[expected == 0].sum() == 0
    often = expected * times >= 5
    rest = times - counts[often].sum(), times * (1 - expected[often].sum())
    observed = np.append(counts[often], rest[0])
    wanted = np.append(expected[often] * times, max(rest[1], 1e-9))
    if rest[1] < 1:  # the rest is too rare for the statistic
        observed, wanted = observed[:-1], wanted[:-1]
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = max(observed.size - 1, 1)
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 1e-6


@pytest.mark.parametrize("filters", FILTERS[3:], ids=str)
def test_kept_tokens_are_exactly_those_of_sorting_everything(filters: dict[str, Any]) -> None:
    options = SamplingOptions(**{"temperature": 4.0, "seed": 2, **filters})
    for seed in range(3):
        logits = random_logits(seed, vocab=60, spread=0.5)
        if seed == 2:  # many are equal, some at the limit
            logits = np.round(logits * 2) / 2
        expected = expected_probabilities(logits, options)
        drawn = np.unique(draw(logits, options, 600))
        likely = np.flatnonzero(expected > 0.02)
        assert set(likely) <= set(drawn) <= set(np.flatnonzero(expected))


def test_top_p_includes_the_token_that_crosses_the_limit() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    options = SamplingOptions(temperature=1.0, top_p=0.6, seed=0)
    assert set(draw(logits, options, 200)) == {0, 1}


@pytest.mark.parametrize("top_k", [0, 3])
def test_top_p_ends_with_the_token_that_reaches_it_exactly(top_k: int) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    options = SamplingOptions(temperature=1.0, top_k=top_k, top_p=0.5, seed=0)
    assert set(draw(logits, options, 200)) == {0}
    equal = np.zeros(4, np.float32)  # whose weights no rounding changes
    options = SamplingOptions(temperature=1.0, top_k=top_k and 4, top_p=0.5, seed=0)
    assert set(draw(equal, options, 200)) == {0, 1}


def test_top_p_after_top_k_is_a_share_of_what_top_k_kept() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # 0.4 is more than 0.5 of 0.7, but less than 0.5 of all.
    options = SamplingOptions(temperature=1.0, top_k=2, top_p=0.5, seed=0)
    assert set(draw(logits, options, 200)) == {0}


def test_equal_logits_everywhere() -> None:
    logits = np.zeros(VOCAB, np.float32)
    assert draw(logits, SamplingOptions(temperature=1.0, top_k=3), 100).max() == 2
    assert draw(logits, SamplingOptions(temperature=1.0, top_p=0.01), 100).max() <= 10
    assert draw(logits, SamplingOptions(temperature=1.0, seed=0), 1000).max() > 900


def test_same_seed_same_tokens_whatever_numpy_global_state() -> None:
    logits = random_logits(3)
    options = SamplingOptions(temperature=1.0, seed=7)
    first = draw(logits, options, 50)
    np.random.seed(0)
    np.testing.assert_array_equal(draw(logits, options, 50), first)
    other = draw(logits, SamplingOptions(temperature=1.0, seed=8), 50)
    assert (other != first).any()
    unseeded = [draw(logits, SamplingOptions(temperature=1.0), 50) for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()


def test_seed_0_is_a_seed() -> None:
    logits = random_logits(3)
    first, again = (draw(logits, SamplingOptions(temperature=1.0, seed=0), 50) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = draw(logits, SamplingOptions(temperature=1.0, seed=1), 50)
    assert (first != other).any()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_reserved_ids_are_never_sampled(filters: dict[str, Any]) -> None:
    logits = random_logits(4)
    reserved = np.r_[np.argsort(-logits)[:50], 900:VOCAB]
    options = SamplingOptions(**{"temperature": 1.0, "seed": 0, "logprobs": 2000, **filters})
    sampler = Sampler(options, reserved)
    for _ in range(100):
        sample = sampler.sample(logits)
        assert sample.token_id not in reserved
    assert not set(reserved) & {id for id, _ in sample.top_logprobs}
    assert len(sample.top_logprobs) == VOCAB - len(set(reserved))
    assert Sampler(SamplingOptions(temperature=0), reserved).sample(logits).token_id not in reserved


def test_masked_logits_are_never_sampled() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 700]] = 1.0, 0.5
    for filters in FILTERS:
        options = SamplingOptions(**{"temperature": 1.0, "seed": 0, **filters})
        assert set(draw(logits, options, 50)) <= {3, 700}


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logprobs_are_log_softmax_before_temperature(temperature: float) -> None:
    logits = random_logits(5)
    reserved = np.array([int(logits.argmax()), 17])
    options = SamplingOptions(temperature=temperature, top_k=5, seed=0, logprobs=4)
    sample = Sampler(options, reserved).sample(logits)
    exact = logits.astype(np.float64)
    exact[reserved] = -np.inf
    exact -= np.log(np.exp(exact).sum())
    assert sample.logprob == pytest.approx(exact[sample.token_id], abs=1e-5)
    best = np.argsort(-exact, kind="stable")[:4]
    assert [id for id, _ in sample.top_logprobs] == best.tolist()
    assert [p for _, p in sample.top_logprobs] == pytest.approx(exact[best].tolist(), abs=1e-5)


def test_no_logprobs_unless_asked() -> None:
    sample = Sampler(SamplingOptions(), NO_IDS).sample(random_logits(6))
    assert sample.logprob is None
    assert sample.top_logprobs == ()


@pytest.mark.parametrize(
    ("given", "kept"), [(None, None), (False, None), (True, 0), (0, 0), (3, 3)]
)
@pytest.mark.parametrize("kind", [None, np.bool_])
def test_logprobs_may_be_a_truth_value(given: Any, kept: int | None, kind: Any) -> None:
    given = kind(given) if kind is not None and isinstance(given, bool) else given
    options = SamplingOptions(logprobs=given)
    assert options.logprobs == kept and type(options.logprobs) is type(kept)
    sample = Sampler(options, NO_IDS).sample(random_logits(6))
    assert (sample.logprob is None) == (kept is None)
    assert len(sample.top_logprobs) == (kept or 0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_what_is_drawn_is_the_same_whatever_is_told_and_whoever_else_is_there(
    filters: dict[str, Any],
) -> None:
    rows = np.stack([random_logits(seed) for seed in range(6)])
    options = {"temperature": 1.0, "seed": 3, **filters}
    alone = Sampler(SamplingOptions(**options), NO_IDS)
    told = Sampler(SamplingOptions(**options, logprobs=2), NO_IDS)
    for row in range(5):
        others = [Sampler(SamplingOptions(seed=i), NO_IDS) for i in range(2)]
        samples = sample_rows(rows[[row, 5, row]], [alone, others[0], told])
        first, _, last = (s.token_id for s in samples if isinstance(s, Sample))
        assert first == last


def test_a_row_that_is_not_a_number_fails_alone() -> None:
    rows = np.stack([random_logits(seed) for seed in range(4)])
    rows[1, 7] = np.nan
    rows[2] = -np.inf
    samplers = [Sampler(SamplingOptions(temperature=0), NO_IDS) for _ in range(3)]
    first, second, third = sample_rows(rows, samplers)  # a step may compute more rows
    assert isinstance(first, Sample) and first.token_id == rows[0].argmax()
    assert isinstance(second, ArtifactError) and "nan at token 7" in str(second)
    assert isinstance(third, ArtifactError) and "-inf" in str(third)


def test_bias_of_what_was_said_is_one_change() -> None:
    options = SamplingOptions(temperature=0, logit_bias={2: 1.5, 7: 1}, frequency_penalty=0.5)
    sampler = Sampler(options, NO_IDS)
    for token in (7, 9, 7):
        sampler.accept(token, 0.0, None)
    ids, amounts = sampler.changes()
    assert dict(zip(ids.tolist(), amounts.tolist(), strict=True)) == {2: 1.5, 7: 0.0, 9: -0.5}


def test_bias_moves_the_choice_and_not_the_logprobs() -> None:
    logits = random_logits(5)
    plain = Sampler(SamplingOptions(temperature=0, logprobs=3), NO_IDS).sample(logits)
    worst = int(logits.argmin())
    options = SamplingOptions(
        temperature=0, logprobs=3, logit_bias={worst: 100, plain.token_id: -100}
    )
    sample = Sampler(options, NO_IDS).sample(logits)
    assert sample.token_id == worst
    assert sample.top_logprobs == plain.top_logprobs
    exact = logits.astype(np.float64)
    assert sample.logprob == pytest.approx(exact[worst] - np.log(np.exp(exact).sum()), abs=1e-5)


def test_bias_does_not_bring_back_what_is_reserved() -> None:
    options = SamplingOptions(logit_bias={7: 100})
    assert 7 not in draw(random_logits(5), options, 3, np.array([7]))


def test_drawn_tokens_follow_the_biased_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    bias = {0: float(np.log(0.5)), 2: float(np.log(2))}  # weights 1, 1 and 2
    drawn = draw(logits, SamplingOptions(temperature=1.0, seed=0, logit_bias=bias), 4000)
    np.testing.assert_allclose(np.bincount(drawn) / drawn.size, [0.25, 0.25, 0.5], atol=0.03)


@pytest.mark.parametrize(
    ("penalties", "expected"),
    [
        ({}, [0, 0, 0, 0, 0, 0]),
        # 3, 2.5 and 1: once said, a token is 1 lower, however often.
        ({"presence_penalty": 1.0}, [0, 1, 0, 0, 0, 0]),
        # Each time that it is said it is 1 lower.
        ({"frequency_penalty": 1.0}, [0, 1, 0, 1, 0, 2]),
        ({"frequency_penalty": -1.0, "presence_penalty": -2.0}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_penalties_are_by_what_was_said(penalties: Any, expected: list[int]) -> None:
    logits = np.array([3, 2.5, 1], np.float32)
    said = draw(logits, SamplingOptions(temperature=0.0, **penalties), 6)
    scores, counts = logits.astype(np.float64), np.zeros(3)
    frequency = penalties.get("frequency_penalty", 0)
    presence = penalties.get("presence_penalty", 0)
    for token in said:  # as OpenAI's documentation defines them
        assert token == np.argmax(scores - frequency * counts - presence * (counts > 0))
        counts[token] += 1
    assert said.tolist()[: len(expected)] == expected


def test_logprobs_are_the_models_own_under_penalties() -> None:
    logits = np.array([3, 2.5, 1], np.float32)
    sampler = Sampler(SamplingOptions(temperature=0, presence_penalty=2.0, logprobs=1), NO_IDS)
    first, second = sampler.sample(logits), sampler.sample(logits)
    assert [first.token_id, second.token_id] == [0, 1]
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert [first.logprob, second.logprob] == pytest.approx(exact[:2].tolist(), abs=1e-6)
    assert second.top_logprobs == first.top_logprobs


def test_extreme_logits_do_not_overflow() -> None:
    logits = np.array([3e38, -3e38, 1e38, -np.inf], np.float32)
    for temperature in (1e-4, 1.0, 100.0):
        assert set(draw(logits, SamplingOptions(temperature=temperature), 20)) == {0}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits = random_logits(7)
    logits[600] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(ArtifactError, match="at token 600"):
            draw(logits, SamplingOptions(temperature=temperature), 1)


def test_nothing_left_to_sample_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="expected finite"):
        draw(np.zeros(4, np.float32), SamplingOptions(), 1, np.arange(4))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"min_p": 2},
        {"seed": -1},
        {"seed": "x"},
        {"logprobs": -1},
        {"logprobs": 1.5},
        {"logprobs": "2"},
        {"temperature": True},
        {"temperature": np.float32("nan")},
        {"temperature": 10**400},
        {"top_p": np.True_},
        {"top_p": "0.5"},
        {"top_k": True},
        {"top_k": np.float32(2)},
        {"seed": False},
        {"stop_ids": 5},
        {"stop_ids": None},
        {"stop_ids": "12"},
        {"stop_ids": b"12"},
        {"stop_ids": [1.0]},
        {"stop_ids": [True]},
        {"stop_ids": (-1,)},
        {"stop_ids": frozenset(["x"])},
        {"stop": ""},
        {"stop": 5},
        {"stop": ["a", ""]},
        {"stop": ["a", 5]},
        {"stop": b"ab"},
        {"stop": {"a": "b"}},
        {"logit_bias": 5},
        {"logit_bias": [5]},
        {"logit_bias": [(5, 1.0)]},
        {"logit_bias": {"5.0": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {5: 100.5}},
        {"logit_bias": {5: float("nan")}},
        {"logit_bias": {5: "1"}},
        {"frequency_penalty": 2.1},
        {"frequency_penalty": "1"},
        {"presence_penalty": -2.1},
        {"presence_penalty": float("nan")},
    ],
    ids=str,
)
def test_option_out_of_range_is_named(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(InputError, match=f"^{name}: expected .*, found "):
        SamplingOptions(**options)


@pytest.mark.parametrize("float_type", [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("int_type", [np.int8, np.uint64])
def test_numbers_of_numpy_are_numbers(float_type: Any, int_type: Any) -> None:
    found = SamplingOptions(
        temperature=float_type(0.5),
        top_p=int_type(1),
        top_k=int_type(3),
        min_p=float_type(0.25),
        seed=int_type(0),
        logprobs=int_type(2),
        stop_ids=frozenset([int_type(4)]),
    )
    assert found == SamplingOptions(0.5, 1.0, 3, 0.25, 0, 2, frozenset([4]))
    assert {type(found.temperature), type(found.top_p)} == {float}
    assert {type(found.top_k), type(found.seed)} == {int}


@pytest.mark.parametrize(
    "ids", [[7, 2, 7], (2, 7), {2, 7}, range(2, 8, 5), np.array([2, 7]), (i for i in (2, 7))]
)
def test_any_iterable_of_ids_is_stop_ids(ids: Any) -> None:
    found = SamplingOptions(stop_ids=ids).stop_ids
    assert isinstance(found, frozenset) and found == {2, 7}


def test_reserved_ids_are_unused_specials_and_padding() -> None:
    names = ("<|startoftext|>", "<|endoftext|>", "<|reserved_5|>", "<|end|>", "<|endofprompt|>")
    specials = {name: 100 + i for i, name in enumerate(names)}
    assert reserved_ids(specials, 108).tolist() == [100, 102, 104, 105, 106, 107]
    assert reserved_ids(specials, 105).tolist() == [100, 102, 104]
    # Tokens that a fine-tune added after the specials are not padding.
    assert reserved_ids(specials, 108, table_size=107).tolist() == [100, 102, 104, 107]


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"temperature": 0}, 0.0),
        ({}, 1.0),
        ({"temperature": 0.5}, 2.0),
        ({"temperature": 9, "top_k": 1}, 0),
    ],
)
def test_what_a_device_is_told_of_a_draw(options: dict[str, Any], scale: float) -> None:
    """Other random bits for every token; the same again, whatever else is asked for."""
    more = {"logprobs": 2, "logit_bias": {1: 1}}
    sampler, again = (Sampler(SamplingOptions(seed=0, **options, **o), NO_IDS) for o in ({}, more))
    first, second = sampler.draw_options(), sampler.draw_options()
    assert np.array(first[:1], np.int32).view(np.float32) == scale
    assert (first == second) == (scale == 0)
    assert again.draw_options() == first


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, []),
        ({"temperature": 0, "top_k": 9, "top_p": 0.5}, []),
        ({"top_k": 1, "top_p": 0.5}, []),
        ({"top_k": 9}, [Limit(9, 1.0, 0.0)]),
        ({"top_p": 0.5}, [Limit(0, 0.5, 0.0)]),
        ({"min_p": 0.5}, [Limit(0, 1.0, 0.5)]),
        ({"top_k": 9, "min_p": 0.5}, [Limit(9, 1.0, 0.5)]),
        ({"top_k": 9, "top_p": 0.5, "min_p": 0.1}, [Limit(9, 1.0, 0.0), Limit(0, 0.5, 0.1)]),
    ],
)
def test_limits_that_a_device_is_told(options: dict[str, Any], limits: list[Limit]) -> None:
    assert Sampler(SamplingOptions(**options), NO_IDS).limits() == limits


class Only:
    """Allows these ids."""

    error: OsscompileError | None = None

    def __init__(self, *ids: int) -> None:
        self.told: list[int] = []
        self._mask = np.zeros(-(-VOCAB // 32), np.uint32)
        for id in ids:
            self._mask[id // 32] |= np.uint32(1 << id % 32)

    def mask(self) -> NDArray[np.uint32]:
        return self._mask

    def push(self, token_id: int) -> None:
        self.told.append(token_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constraint_leaves_only_what_it_allows(temperature: float) -> None:
    logits = np.arange(VOCAB, dtype=np.float32)  # the allowed ones are not the best
    only = Only(0, 31, 32, VOCAB - 1)
    options = SamplingOptions(temperature=temperature, seed=0, logprobs=1, logit_bias={32: 100})
    sampler = Sampler(options, np.array([VOCAB - 1]), only)
    drawn = [sampler.sample(logits) for _ in range(200)]
    assert only.told == [sample.token_id for sample in drawn]
    assert set(only.told) == {32}
    flat = Sampler(SamplingOptions(temperature=1.0, seed=0), np.array([VOCAB - 1]), only)
    assert {flat.sample(np.zeros(VOCAB, np.float32)).token_id for _ in range(200)} == {0, 31, 32}
    assert drawn[0].logprob is not None and drawn[0].logprob < -1  # the model's own


def test_a_constraint_that_cannot_go_on_is_a_fault_of_what_was_asked() -> None:
    only = Only(0)
    sampler = Sampler(SamplingOptions(), NO_IDS, only)
    assert sampler.error is None
    only.error = OsscompileError("grammar: expected one that can be followed, found (a{9}){9}")
    assert isinstance(sampler.error, InputError)
    assert str(sampler.error).startswith("response_format: grammar: expected")
