"""The choice of the next tokens on the device, against numpy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cuda_device import H100
from kernel_cases import HERE
from kernel_runner import Array, build
from metal_device import needs_gxx, on_this_machine
from opencl_device import OPENCL, needs_opencl
from reference import F64, to_float64
from test_sampler import expected_probabilities

from osscompile.kernels import choose, limit, report
from osscompile.runtime.chooser import KEEP_ALL, OPTIONS, REPORTED, mask_words
from osscompile.runtime.sampling_options import SamplingOptions
from osscompile.targets import Target

VOCAB, PARTS, FEWER = 1000, 42, 6  # no part divides another
ROWS = 32  # at most

on_targets = pytest.mark.parametrize(
    "target",
    [
        HERE,
        pytest.param(OPENCL, marks=needs_opencl),
        pytest.param(on_this_machine(HERE), marks=needs_gxx),
        pytest.param(H100, marks=needs_gxx),
    ],
    ids=lambda target: target.name,
)


# --- Functions of the artifact, kernel by kernel ----------------------------------------------


class Choice:
    """Rows of logits [rows, vocab], and for each what is masked, by ids."""

    def __init__(
        self,
        logits: Array,
        target: Target,
        masked: list[Any] | None = None,
        most_rows: int = ROWS,
    ) -> None:
        self.logits, self.target, self.most = np.atleast_2d(logits), target, most_rows
        count, self.vocab = self.logits.shape
        self.allowed = np.ones((most_rows + 1, mask_words(self.vocab) * 32), np.bool_)
        for row, ids in enumerate(masked or [], 1):
            self.allowed[row, ids] = False
        self.mask_rows = np.zeros(count, np.int32)
        if masked is not None:
            self.mask_rows[:] = np.arange(1, count + 1)
        self.masks = np.packbits(self.allowed, axis=1, bitorder="little").view("<u4")
        self.limits = np.tile(np.array([-np.inf, 0], np.float32), (most_rows, 1))

    def run(self, kernel: Any, *arguments: Array) -> Any:
        return build(kernel, self.target)(*arguments)

    def best(self, options: Array, is_greedy: bool = False) -> Any:
        parts = min(PARTS, self.vocab)
        fewer = min(FEWER, parts)
        kernel = choose.draw(self.vocab, parts, self.most, is_greedy)
        arguments = options, self.mask_rows, self.logits, self.masks, self.limits
        left = self.run(kernel, *arguments)
        left = self.run(choose.narrow(parts, fewer), *left)
        return self.run(choose.narrow(fewer, 1), *left)

    def choose(self, options: Array) -> tuple[Array, Array]:
        """Return each row's token and its logit."""
        chosen = self.run(choose.choice(self.vocab), *self.best(options), self.logits)
        return chosen[:, 0].astype(np.int64), chosen[:, 1]

    def limit(self, options: Array) -> None:
        _, ids = self.best(options, is_greedy=True)
        state = np.tile(np.array([-(1 << 31), 0, 0, 0], np.int32), (len(self.logits), 1))
        arguments = options, self.mask_rows, self.logits, self.masks, self.limits, ids
        for _ in range(limit.num_levels(self.vocab)):
            sums = self.run(limit.sums(self.vocab, self.most), *arguments, state)
            state = self.run(limit.decide(self.vocab), options, sums, state)
        kernel = limit.finish(self.vocab, self.most)
        self.limits = self.run(kernel, options, self.logits, ids, state)

    def kept(self, row: int) -> set[int]:
        """Return the ids within the limits."""
        logits, (lowest, last) = self.logits[row], self.limits[row]
        ids = np.arange(self.vocab)
        kept = (logits > lowest) | ((logits == lowest) & (ids <= last))
        kept &= self.allowed[self.mask_rows[row], : self.vocab] & (logits > -np.inf)
        return set(np.flatnonzero(kept).tolist())

    def report(self) -> Array:
        parts = min(7, self.vocab)
        fewer = min(3, parts)
        lists = self.run(report.best_logits(self.vocab, parts, self.most), self.logits, self.masks)
        lists = self.run(report.best_of(parts, fewer), *lists)
        lists = self.run(report.best_of(fewer, 1), *lists)
        kernel = report.masses(self.vocab, self.most)
        masses = self.run(kernel, self.logits, self.masks, lists[1])
        told: Array = self.run(report.report(self.vocab), *lists, self.logits, masses)
        return told


def options_of(
    rows: int,
    temperature: float = 0.0,
    seeds: Array | tuple[int, int] = (0, 0),
    count: int = 0,
    share: float = 1.0,
    least: float = 0.0,
) -> Array:
    options = np.zeros((rows, OPTIONS), np.int32)
    if temperature:
        options[:, 0] = np.float32([1 / temperature]).view(np.int32)
    options[:, 1:3] = seeds
    options[:, 3] = count
    options[:, 4:] = np.float32([share, least]).view(np.int32)
    return options


def random_logits(seed: int = 0, rows: int = 1, vocab: int = VOCAB) -> Array:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def random_seeds(seed: int, count: int) -> Array:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, (count, 2)).astype(np.int32)


def gumbel(seed: Array | tuple[int, int], vocab: int = VOCAB) -> F64:
    """Return every token's number, made from 64 random bits by a hash of the token."""

    def mix(x: Array) -> Array:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    low, high = np.array(seed, np.int32).view(np.uint32)
    bits = mix(mix(np.arange(vocab, dtype=np.uint32) + low) + high)
    return -np.log(-np.log1p(-(bits + 0.5) / 2.0**32))


# --- A token of each row ----------------------------------------------------------------------


@on_targets
def test_the_most_probable_token_that_may_be_chosen(target: Target) -> None:
    logits = random_logits(rows=4)
    orders = np.argsort(-logits, axis=1)
    masked = [orders[row, :row] for row in range(3)] + [np.delete(np.arange(VOCAB), 998)]
    expected = [*(orders[row, row] for row in range(3)), 998]
    tokens, found = Choice(logits, target, masked).choose(options_of(4))
    assert tokens.tolist() == expected
    assert found.tolist() == logits[np.arange(4), expected].tolist()


@on_targets
def test_of_equal_logits_the_lowest_id(target: Target) -> None:
    logits = random_logits(rows=5)
    ties = [(3, 45, 999), (41, 42, 43), (998, 999), (0, 252), (7, 500)]
    for row, ids in zip(logits, ties, strict=True):
        row[list(ids)] = 50
    logits[4] -= 50  # in the last row they are 0, of either sign
    logits[4, 7] = -0.0
    logits[4, 8:500] = -1
    tokens, _ = Choice(logits, target).choose(options_of(5))
    assert tokens.tolist() == [min(ids) for ids in ties]


@on_targets
@pytest.mark.parametrize("temperature", [1.0, 0.3, 20.0])
def test_draws_by_the_defined_random_numbers(target: Target, temperature: float) -> None:
    logits, seeds = random_logits(1, rows=20), random_seeds(2, 20)
    choice = Choice(logits, target, [(5, 7)] * 20)
    tokens, found = choice.choose(options_of(20, temperature, seeds))
    for row, token in enumerate(tokens.tolist()):
        scores = to_float64(logits[row]) / temperature + gumbel(seeds[row])
        scores[[5, 7]] = -np.inf
        best, second = np.argsort(-scores)[:2]
        assert found[row] == logits[row, token]
        assert token == best or (token == second and scores[best] - scores[second] < 1e-4)


@on_targets
def test_rows_draw_alone_what_they_draw_among_others(target: Target) -> None:
    logits, seeds = random_logits(1, rows=9), random_seeds(3, 9)
    options = options_of(9, 1.0, seeds, share=0.9)
    options[::3] = options_of(3)  # greedy ones among them
    together = Choice(logits, target)
    together.limit(options)
    tokens, _ = together.choose(options)
    for row in range(9):
        alone = Choice(logits[row], target)
        alone.limit(options[row : row + 1])
        assert alone.choose(options[row : row + 1])[0] == tokens[row]
        np.testing.assert_array_equal(alone.limits[0], together.limits[row])


def test_random_numbers_draw_from_the_softmax() -> None:
    """The numbers that kernels are compared with draw right: 20,000 draws from some tokens."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, -3.0])
    expected = np.exp(logits) / np.exp(logits).sum()
    tokens = np.array([0, 1, 77, 500, 999])
    draws = [int(np.argmax(logits + gumbel(seed)[tokens])) for seed in random_seeds(3, 20000)]
    counts = np.bincount(draws, minlength=5)
    assert np.sum((counts - 20000 * expected) ** 2 / (20000 * expected)) < 18.5  # 1 in 1000


@on_targets
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_no_number_shows_in_its_row(target: Target, temperature: float) -> None:
    logits, places = random_logits(rows=7), [0, 43, 999, 77]
    for row, token in enumerate(places):
        logits[row, token] = [np.nan, -np.nan, np.nan, np.inf][row]
    logits[4] = -np.inf
    masked = [[0], [], [], [], [], np.arange(VOCAB), [3]]  # also where it must not be chosen
    choice = Choice(logits, target, masked)
    options = options_of(7, temperature, share=0.5)
    for limited in (False, True):
        if limited:
            choice.limit(options)
        tokens, found = choice.choose(options)
        assert tokens[:4].tolist() == places
        assert np.isnan(found[:3]).all() and found[3] == np.inf
        assert tokens[4:6].tolist() == [-1, -1]
        assert np.isfinite(found[6]) and tokens[6] != 3


# --- Limits -----------------------------------------------------------------------------------

LIMITS: list[dict[str, Any]] = [
    {"count": 1},
    {"count": 5},
    {"count": 999},
    {"count": KEEP_ALL},
    {"share": 1e-9},
    {"share": 0.5},
    {"share": 0.95},
    {"share": 0.999},
    {"share": 1.0, "least": 0.05},
    {"share": 0.9, "least": 0.2},
    {"count": 7, "least": 1.0},
]


def expected_ids(
    logits: Array,
    temperature: float,
    count: int = 0,
    share: float = 1.0,
    least: float = 0.0,
    ids: Any = None,
    slack: float = 0.0,
) -> set[int]:
    """Return which of `ids` are kept: sort all; `slack` is added to the share."""
    ids = np.arange(logits.size) if ids is None else np.array(sorted(ids))
    ids = ids[logits[ids] > -np.inf]
    order = ids[np.argsort(-to_float64(logits[ids]), kind="stable")]
    weights = np.exp((to_float64(logits[order]) - float(logits[order[0]])) / temperature)
    if count:
        order, weights = order[:count], weights[:count]
    elif share < 1:
        sums = np.cumsum(weights) / weights.sum()
        number = np.searchsorted(sums, share + slack) + 1
        order, weights = order[:number], weights[:number]
    return set(order[weights >= least].tolist())


@on_targets
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_limits_are_those_of_sorting_everything(target: Target, kind: str) -> None:
    logits = random_logits(4, rows=len(LIMITS))
    if kind == "ties":
        logits = np.round(logits)
    logits[:, 3] = -np.inf
    masked = [np.arange(10 + row, 20 + row) for row in range(len(LIMITS))]
    options = np.concatenate([options_of(1, 0.8, **some) for some in LIMITS])
    choice = Choice(logits, target, masked)
    choice.limit(options)
    for row, some in enumerate(LIMITS):
        ids = np.delete(np.arange(VOCAB), masked[row])
        near = [expected_ids(logits[row], 0.8, **some, ids=ids, slack=s) for s in (-1e-6, 0, 1e-6)]
        assert choice.kept(row) in near, some


@on_targets
def test_a_share_that_is_reached_exactly(target: Target) -> None:
    """Sums of equal weights are not rounded: the token that reaches it is the last."""
    choice = Choice(np.zeros((3, VOCAB), np.float32), target)
    choice.limit(np.concatenate([options_of(1, 1.0, share=s) for s in (0.5, 0.001, 0.25)]))
    assert [choice.kept(row) for row in range(3)] == [set(range(n)) for n in (500, 1, 250)]


@on_targets
def test_all_but_one_are_masked(target: Target) -> None:
    others = [np.delete(np.arange(VOCAB), token) for token in (0, 500, 999)]
    for some in ({"count": 3}, {"share": 0.3}, {"least": 0.5}):
        choice = Choice(random_logits(rows=3), target, others)
        options = options_of(3, 1.0, random_seeds(5, 3), **some)
        choice.limit(options)
        assert choice.choose(options)[0].tolist() == [0, 500, 999]


@on_targets
def test_a_share_after_a_count_is_one_of_what_was_kept(target: Target) -> None:
    logits = random_logits(6, rows=2)
    choice = Choice(logits, target)
    choice.limit(options_of(2, 1.5, count=9))
    choice.limit(options_of(2, 1.5, share=0.6, least=0.1))
    for row in range(2):
        first = expected_ids(logits[row], 1.5, count=9)
        expected = expected_ids(logits[row], 1.5, share=0.6, least=0.1, ids=first)
        assert choice.kept(row) == expected


@pytest.mark.parametrize(
    ("target", "vocab"),
    [(HERE, 1), pytest.param(OPENCL, 17, marks=needs_opencl)],
    ids=["1", "17"],
)
def test_small_vocabularies(target: Target, vocab: int) -> None:
    logits = random_logits(7, rows=3, vocab=vocab)
    choice = Choice(logits, target)
    for some in ({"count": 2}, {"share": 0.6}):
        choice.limit(options_of(3, 1.0, **some))
        for row in range(3):
            assert choice.kept(row) == expected_ids(logits[row], 1.0, **some)
        choice.limits = Choice(logits, target).limits
    assert choice.choose(options_of(3))[0].tolist() == logits.argmax(axis=1).tolist()
    check_report(choice)


def test_the_vocabulary_of_gpt_oss() -> None:
    vocab = 201_088
    logits = random_logits(8, rows=3, vocab=vocab)
    logits[1] = np.round(logits[1] * 4) / 4
    logits[2] /= 100  # nearly all are as probable
    masked = [np.arange(200_000, vocab)] * 3
    choice = Choice(logits, HERE, masked)
    options = options_of(3, 1.0, random_seeds(9, 3), share=0.9)
    options[2, 3] = 150_000  # tokens
    choice.limit(options)
    ids = np.arange(200_000)
    for row, some in enumerate(({"share": 0.9}, {"share": 0.9}, {"count": 150_000})):
        expected = expected_ids(logits[row], 1.0, **some, ids=ids)
        assert len(choice.kept(row) ^ expected) <= 2 if row < 2 else not choice.kept(row) ^ expected
    tokens, _ = choice.choose(options)
    assert all(token in choice.kept(row) for row, token in enumerate(tokens.tolist()))
    check_report(choice)


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_have_the_distribution_of_sorting_everything(filters: dict[str, Any]) -> None:
    """That with which the host's sampler is compared."""
    times, vocab = 4000, 60
    row = random_logits(10, vocab=vocab)[0]
    options = SamplingOptions(temperature=1.3, **filters)
    expected = expected_probabilities(row, options) * times
    choice = Choice(np.tile(row, (times, 1)), HERE, most_rows=times)
    seeds = random_seeds(11, times)
    if options.top_k:
        choice.limit(options_of(times, 1.3, count=options.top_k))
    if options.top_p < 1 or options.min_p:
        choice.limit(options_of(times, 1.3, share=options.top_p, least=options.min_p))
    tokens, _ = choice.choose(options_of(times, 1.3, seeds))
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    rest = expected[~often].sum()
    chi_square = np.sum((counts[often] - expected[often]) ** 2 / expected[often])
    chi_square += (counts[~often].sum() - rest) ** 2 / max(rest, 1.0)
    freedom = often.sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


# --- Reports and changes ----------------------------------------------------------------------


def check_report(choice: Choice) -> None:
    told = choice.report()
    allowed = choice.allowed[0, : choice.vocab]
    for logits, row in zip(choice.logits, told, strict=True):
        exact = np.where(allowed, to_float64(logits), -np.inf)
        total = exact.max() + math.log(np.exp(exact - exact.max()).sum())
        assert row[0] == exact.max()
        assert row[0] + math.log(row[1]) == pytest.approx(total, abs=3e-5)
        order = np.argsort(-exact, kind="stable")[:REPORTED]
        order = order[exact[order] > -np.inf]
        ids, found = row[2::2], row[3::2]
        assert ids[: order.size].tolist() == order.tolist()
        assert found[: order.size].tolist() == logits[order].tolist()
        assert (ids[order.size :] == -1).all()


@on_targets
def test_report(target: Target) -> None:
    """It is of the model's own distribution: only what the first mask hides is left out."""
    logits = random_logits(12, rows=5)
    logits[1] = np.round(logits[1])
    logits[2, 20:] = -np.inf
    logits[3] = 0
    choice = Choice(logits, target, [np.arange(VOCAB)] * 5)
    choice.allowed[0, [0, 7, int(logits[0].argmax())]] = False
    choice.masks = np.packbits(choice.allowed, axis=1, bitorder="little").view("<u4")
    check_report(choice)


@on_targets
def test_changes_of_logits(target: Target) -> None:
    logits, places = random_logits(13, rows=3), np.array([0, 999, 1000, 2999, 1503], np.int32)
    logits.reshape(-1)[1000] = -np.inf
    amounts = np.array([100, -100, 5, 0.25, -2], np.float32)
    taken = build(choose.take_logits(VOCAB), target)(places, logits)
    np.testing.assert_array_equal(taken[:, 0], logits.reshape(-1)[places])
    expected = logits.copy()
    expected.reshape(-1)[places] += amounts
    kernel = build(choose.change_logits(VOCAB), target)
    changed = kernel(logits, places, amounts.view(np.int32), in_place=1)
    np.testing.assert_array_equal(changed, expected)
