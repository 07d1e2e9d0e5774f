"""The choice of the next token on the device, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import HERE
from kernel_runner import Array, build
from metal_device import needs_gxx, on_this_machine
from opencl_device import OPENCL, needs_opencl
from reference import F64, to_float64

from osscompile.kernels import choose
from osscompile.targets import Target

VOCAB, PARTS, FEWER = 1000, 42, 6  # no part divides another

on_targets = pytest.mark.parametrize(
    "target",
    [
        HERE,
        pytest.param(OPENCL, marks=needs_opencl),
        pytest.param(on_this_machine(HERE), marks=needs_gxx),
    ],
    ids=lambda target: target.name,
)


def chosen(
    logits: Array,
    target: Target,
    temperature: float = 0.0,
    seed: tuple[int, int] = (0, 0),
    masked: tuple[int, ...] = (),
) -> tuple[int, float]:
    """Run the kernels, and return the token and its logit."""
    options = np.array([0, *seed], np.int32)
    if temperature:
        options[:1] = np.float32([1 / temperature]).view(np.int32)
    mask = np.zeros(VOCAB, np.float32)
    mask[list(masked)] = -np.inf
    left = build(choose.draw(VOCAB, PARTS), target)(options, logits, mask)
    left = build(choose.narrow(PARTS, FEWER), target)(*left)
    _, token = build(choose.narrow(FEWER, 1), target)(*left)
    ((number, logit),) = build(choose.choice(VOCAB), target)(token, logits)
    return int(number), float(logit)


def random_logits(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 3, (1, VOCAB)).astype(np.float32)


def gumbel(seed: tuple[int, int]) -> F64:
    """Return every token's number, made from 64 random bits by a hash of the token."""

    def mix(x: Array) -> Array:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    low, high = np.array(seed, np.int32).view(np.uint32)
    bits = mix(mix(np.arange(VOCAB, dtype=np.uint32) + low) + high)
    return -np.log(-np.log1p(-(bits + 0.5) / 2.0**32))


@on_targets
def test_the_most_probable_token_that_may_be_chosen(target: Target) -> None:
    logits = random_logits()
    order = np.argsort(-logits[0])
    for count in range(3):
        masked = tuple(order[:count].tolist())
        assert chosen(logits, target, masked=masked) == (order[count], logits[0, order[count]])


@on_targets
@pytest.mark.parametrize("ids", [(3, 45, 999), (41, 42, 43), (998, 999), (0, 252)])
def test_of_equal_logits_the_lowest_id(target: Target, ids: tuple[int, ...]) -> None:
    logits = random_logits()
    logits[0, list(ids)] = 50
    assert chosen(logits, target) == (min(ids), 50)


@on_targets
@pytest.mark.parametrize("temperature", [1.0, 0.3, 20.0])
def test_draws_by_the_defined_random_numbers(target: Target, temperature: float) -> None:
    logits, rng = random_logits(1), np.random.default_rng(2)
    for seed in rng.integers(-(2**31), 2**31, (20, 2)).tolist():
        scores = to_float64(logits[0]) / temperature + gumbel(tuple(seed))
        scores[[5, 7]] = -np.inf
        best, second = np.argsort(-scores)[:2]
        found, logit = chosen(logits, target, temperature, tuple(seed), masked=(5, 7))
        assert logit == logits[0, found]
        assert found == best or (found == second and scores[best] - scores[second] < 1e-4)


def test_random_numbers_draw_from_the_softmax() -> None:
    """The numbers that kernels are compared with draw right: 20,000 draws from some tokens."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, -3.0])
    expected = np.exp(logits) / np.exp(logits).sum()
    tokens = np.array([0, 1, 77, 500, 999])
    rng = np.random.default_rng(3)
    seeds = rng.integers(-(2**31), 2**31, (20000, 2)).tolist()
    draws = [int(np.argmax(logits + gumbel(tuple(seed))[tokens])) for seed in seeds]
    counts = np.bincount(draws, minlength=5)
    assert np.sum((counts - 20000 * expected) ** 2 / (20000 * expected)) < 18.5  # 1 in 1000


@on_targets
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_no_number_shows(target: Target, temperature: float) -> None:
    for token in (0, 43, 999):
        logits = random_logits()
        logits[0, token] = -np.nan if token else np.nan
        found, logit = chosen(logits, target, temperature)
        assert found == token and np.isnan(logit)
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    assert chosen(logits, target, temperature)[1] == -np.inf
    logits[0, 77] = np.inf
    assert chosen(logits, target, temperature) == (77, np.inf)
