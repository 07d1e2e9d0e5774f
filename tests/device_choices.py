"""Checks of nano on devices that choose the next token where the logits are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osscompile.runtime import load
from osscompile.runtime.errors import ArtifactError

every_temperature = pytest.mark.parametrize("temperature", [0.0, 1.0])
every_option_of_the_sampler = pytest.mark.parametrize(
    "option",
    [
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.1},
        {"logprobs": 2},
        {"logit_bias": {0: -1}, "frequency_penalty": 1e-6},
    ],
    ids=str,
)


def check_logits_stay(nano: Path, temperature: float) -> None:
    """Logits stay on the device if a token is greedy or drawn from the whole softmax."""
    model = load(nano)
    shapes: list[tuple[int, ...]] = []
    numpy: Callable[[Any], np.ndarray] = model._runner.device.numpy

    def copied(result: Any) -> np.ndarray:
        shapes.append(tuple(result.shape))
        return numpy(result)

    vars(model._runner.device)["numpy"] = copied
    options: dict[str, Any] = {"max_tokens": 6, "temperature": temperature, "seed": 5}
    first = [token.token_id for token in model.generate(range(20), **options)]
    assert shapes == [(1, 2)] * len(first)
    assert [token.token_id for token in model.generate(range(20), **options)] == first
    assert not set(first) & set(model._questions.reserved.tolist())
    if temperature:
        others = model.generate(range(20), **options | {"seed": 6})
        assert [token.token_id for token in others] != first
    else:
        assert first[0] == np.argmax(load(nano).prefill(range(20)))


def check_sampler_does_the_rest(nano: Path, option: dict[str, Any]) -> None:
    """The sampler gets the same logits up to rounding, so that what cannot differ is the same."""
    tokens = list(load(nano).generate(range(20), max_tokens=4, temperature=1e-3, **option))
    greedy = list(load(nano).generate(range(20), max_tokens=4))
    assert [t.token_id for t in tokens] == [t.token_id for t in greedy]
    assert all(len(t.top_logprobs) == (2 if "logprobs" in option else 0) for t in tokens)


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
