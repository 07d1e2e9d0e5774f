"""Checks of nano on devices that choose the next token where the logits are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osscompile.runtime import Model, load
from osscompile.runtime.chooser import REPORTED
from osscompile.runtime.errors import ArtifactError
from osscompile.runtime.sampler import Sample, Sampler
from osscompile.runtime.sampling_options import SamplingOptions

PROMPT = list(range(20))
ONE_BY_ONE: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}]
TOGETHER: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"logit_bias": {0: -1, 5: 2.5}, "frequency_penalty": 1.0, "presence_penalty": -0.5},
]
every_option_of_the_sampler = pytest.mark.parametrize("option", ONE_BY_ONE + TOGETHER, ids=str)
# For stand-ins, which take ten seconds for each: test_kernels_choose.py has each limit every day.
options_together = pytest.mark.parametrize(
    "option",
    [*(pytest.param(o, marks=pytest.mark.long) for o in ONE_BY_ONE), *TOGETHER],
    ids=str,
)


def check_logits_stay(nano: Path, option: dict[str, Any]) -> None:
    """Only tokens and what is asked for of them leave the device, which draws the same tokens
    whether it is asked or not, alone and among others, and tells of them what is so."""
    model = load(nano)
    shapes: list[tuple[int, ...]] = []
    numpy: Callable[[Any], np.ndarray] = model._runner.device.numpy

    def copied(result: Any) -> np.ndarray:
        shapes.append(tuple(result.shape))
        return numpy(result)

    vars(model._runner.device)["numpy"] = copied
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 3.0, "seed": 5, **option}
    first = [token.token_id for token in model.generate(PROMPT, **options)]
    assert shapes == [(1, 2)] * len(first)
    assert not set(first) & set(model._questions.reserved.tolist())
    told = list(model.generate(PROMPT, **options, logprobs=2))
    assert [token.token_id for token in told] == first
    assert all(size < 50 for _, size in shapes)
    others = [[7, 8], PROMPT, list(range(30))]
    assert [t.token_id for t in model.generate_batch(others, **options, logprobs=0)[1]] == first
    if options["temperature"]:
        drawn = (model.generate(PROMPT, **options | {"seed": seed}) for seed in range(6, 16))
        assert any([t.token_id for t in tokens] != first for tokens in drawn)
    check_logprobs(model, first, told)
    many = next(model.generate(PROMPT, **options, logprobs=REPORTED + 1))
    assert many.token_id == first[0] and len(many.top_logprobs) == REPORTED + 1
    assert many.logprob == pytest.approx(told[0].logprob, abs=1e-5)


def check_logprobs(model: Model, ids: list[int], told: list[Any]) -> None:
    """Compare with logits of the same steps: those of many rows may be rounded otherwise."""
    steps = [model.prefill(PROMPT), *(model.decode(token) for token in ids[:-1])]
    logits = np.stack(steps).astype(np.float64)
    logits[:, model._questions.reserved] = -np.inf
    best = logits.max(axis=1, keepdims=True)
    exact = logits - best - np.log(np.exp(logits - best).sum(axis=1, keepdims=True))
    for row, token in zip(exact, told, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=0.05)
        top = np.argsort(-row, kind="stable")[:2]
        assert [p for _, p in token.top_logprobs] == pytest.approx(row[top].tolist(), abs=0.05)


class _OneOf:
    """A constraint: some ids, and no others."""

    error = None

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.told = ids, list[int]()

    def mask(self) -> np.ndarray:
        bits = np.zeros(1024, np.bool_)
        bits[self.ids] = True
        return np.packbits(bits, bitorder="little").view("<u4")

    def push(self, token_id: int) -> None:
        self.told.append(token_id)


def check_rows_of_all_kinds(nano: Path) -> None:
    """Rows with and without a constraint, a limit and a change, in one call."""
    model = load(nano)
    reserved = model._questions.reserved
    constraint = _OneOf([int(reserved[0]), 17, 400, 401])
    kinds: list[tuple[SamplingOptions, Any]] = [
        (SamplingOptions(temperature=0), None),
        (SamplingOptions(temperature=1, top_p=0.5, seed=1), constraint),
        (SamplingOptions(temperature=0, logit_bias={33: 100}), None),
        (SamplingOptions(temperature=1, top_k=2, seed=2, logprobs=1), None),
        (SamplingOptions(temperature=2, top_k=9, min_p=1, seed=3), _OneOf([77])),
    ]

    def work() -> tuple[np.ndarray, list[Sample | ArtifactError]]:
        rows = model._runner.device.numpy(model._step(PROMPT, 5)).copy()
        model._sequence.restart()
        logits = model._step(PROMPT, 5)
        return rows, model._runner.sample(logits, [Sampler(o, reserved, c) for o, c in kinds])

    rows, samples = model._driver.call(work)
    rows[:, reserved] = -np.inf
    ids = [sample.token_id for sample in samples if isinstance(sample, Sample)]
    assert ids[0] == rows[0].argmax()
    assert ids[1] in (17, 400, 401) and constraint.told == [ids[1]]
    assert ids[2] == 33 and ids[4] == 77
    assert ids[3] in np.argsort(-rows[3])[:2]
    third = samples[3]
    assert isinstance(third, Sample) and third.top_logprobs[0][0] == rows[3].argmax()


def check_broken_weights_show(nano: Path) -> None:
    model = load(nano)
    names = [weight.name for weight in model.manifest.weights]
    at = len(model._runner._bound) - len(names) + names.index("norm.weight")
    broken = np.full(model.manifest.weights[names.index("norm.weight")].shape, np.nan, np.float32)
    model._runner._bound = [
        *model._runner._bound[:at],
        model._runner.device.tensor(broken),
        *model._runner._bound[at + 1 :],
    ]
    with pytest.raises(ArtifactError, match="logits: expected finite numbers, found nan"):
        list(model.generate(range(3)))
