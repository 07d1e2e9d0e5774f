"""The KV cache across calls: the entries that are kept, and the calls that may use them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from talker import (
    CHUNK,
    ids_of,
    random_ids,
)

from osscompile.runtime import ArtifactError, GeneratedToken, InputError, Model, load


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker)


@pytest.fixture
def other(talker: Path) -> Model:
    """A second model, whose cache nothing has used."""
    return load(talker)


def check_against_fresh(
    model: Model, talker: Path, prompt: list[int], count: int
) -> list[GeneratedToken]:
    """Generate, and compare with a model that was loaded for this call."""
    fresh = load(talker)
    reused = list(model.generate(prompt, max_tokens=count, logprobs=5))
    expected = list(fresh.generate(prompt, max_tokens=count, logprobs=5))
    assert ids_of(iter(reused)) == ids_of(iter(expected))
    for a, b in zip(reused, expected, strict=True):
        assert [p for _, p in a.top_logprobs] == pytest.approx(
            [p for _, p in b.top_logprobs], abs=1e-4
        )
    return reused


def computed_positions(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the first position of every run of the model."""
    positions: list[int] = []
    run = model._runner.device.run

    def spy(function: str, inputs: Any, bound: Any) -> Any:
        positions.append(int(inputs[0][0, 1]))
        return run(function, inputs, bound)

    monkeypatch.setattr(model._runner.device, "run", spy)
    return positions


@pytest.mark.parametrize("generated", [1, 5, CHUNK + 8, 3 * CHUNK])
@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3, 100])
def test_next_turn_continues_where_the_prompts_part(
    model: Model, talker: Path, monkeypatch: pytest.MonkeyPatch, length: int, generated: int
) -> None:
    """A chat leaves the reasoning out of the next prompt; a long answer goes back to its start.
    Only new tokens are computed."""
    prompt = random_ids(length)
    list(model.generate(prompt, max_tokens=generated))
    positions = computed_positions(model, monkeypatch)
    check_against_fresh(model, talker, prompt + random_ids(20, seed=1), 3)
    assert positions[0] >= length


@pytest.mark.parametrize("generated", [1, 3 * CHUNK])
def test_same_prompt_again_computes_one_token(
    model: Model, talker: Path, monkeypatch: pytest.MonkeyPatch, generated: int
) -> None:
    prompt = random_ids(100)
    list(model.generate(prompt, max_tokens=generated))
    positions = computed_positions(model, monkeypatch)
    check_against_fresh(model, talker, prompt, 3)
    assert positions[0] == len(prompt) - 1


@pytest.mark.parametrize("back", [1, CHUNK - 8, CHUNK - 7, CHUNK - 1, CHUNK, CHUNK + 1, 60])
@pytest.mark.parametrize("length", [89, 96, 97])
def test_edit_before_the_end_of_a_prompt(
    model: Model, talker: Path, length: int, back: int
) -> None:
    prompt = random_ids(length)
    list(model.generate(prompt, max_tokens=1))
    edited = [*prompt[:-back], *random_ids(5, seed=1)]
    check_against_fresh(model, talker, edited, 3)


@pytest.mark.parametrize("back", [1, CHUNK - 8, CHUNK - 7, CHUNK - 1, CHUNK])
def test_edit_before_a_prompt_that_was_gone_back_to(model: Model, talker: Path, back: int) -> None:
    """What a long answer wrote beyond the prompt is not taken for the prompt's."""
    prompt = random_ids(89)
    list(model.generate(prompt, max_tokens=2 * CHUNK))
    model.prefill([*prompt, 7])  # goes back to where the answer began
    check_against_fresh(model, talker, [*prompt[:-back], *random_ids(5, seed=1)], 3)


def test_back_twice(model: Model, talker: Path) -> None:
    """What was decoded in between is gone from the window pages that the last prompt needs."""
    prompt = random_ids(100)
    list(model.generate(prompt, max_tokens=6))  # five are decoded
    model.prefill([*prompt[:90], 1])
    for token in random_ids(64, seed=1):
        model.decode(token)
    model.prefill([*prompt[:80], 2])
    check_against_fresh(model, talker, [*prompt[:65], *random_ids(5, seed=2)], 3)


@pytest.mark.parametrize("back", [100, 70, 1], ids=["kept", "within", "to nothing"])
def test_what_is_forgotten_is_zero(model: Model, back: int) -> None:
    """Else a number that is none would spoil later answers, even where nothing looks at it."""
    prompt = random_ids(100)
    list(model.generate(prompt, max_tokens=3 * CHUNK))
    model.prefill([*prompt[:back], 3])
    assert all(array.any() for array in model._runner.cache.arrays)
    model.forget()
    assert not any(array.any() for array in model._runner.cache.arrays)


def test_scoring_in_between_invalidates_the_cache(model: Model, talker: Path) -> None:
    prompt = random_ids(60)
    list(model.generate(prompt, max_tokens=2))
    model.logits(random_ids(150, seed=1))
    check_against_fresh(model, talker, prompt + random_ids(30, seed=2), 3)


def test_interrupted_prefill_leaves_a_usable_cache(
    model: Model, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_ids(90)
    list(model.generate(prompt, max_tokens=2))
    with monkeypatch.context() as patch:
        run, calls = model._runner.device.run, itertools.count()

        def interrupt(function: str, inputs: Any, bound: Any) -> Any:
            result = run(function, inputs, bound)
            if next(calls) == 1:
                raise KeyboardInterrupt
            return result

        patch.setattr(model._runner.device, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(model.generate(prompt[:70] + random_ids(90, seed=1)))
    check_against_fresh(model, talker, prompt[:68] + random_ids(9, seed=2), 3)


@pytest.mark.parametrize("seed", range(8))
def test_any_history_gives_what_a_fresh_model_gives(model: Model, talker: Path, seed: int) -> None:
    """Random prompts share a prefix of random length with what came before. Answers have random
    lengths, some are left in the middle, and scoring happens in between."""
    rng = np.random.default_rng(seed)
    history = random_ids(int(rng.integers(1, 120)), seed=seed)
    for step in range(12):
        kept = int(rng.integers(len(history)))
        if rng.random() < 0.8:
            kept = max(0, len(history) - int(rng.integers(2 * CHUNK + 2)))
        new = random_ids(int(rng.integers(1, 2 * CHUNK)), seed=1000 * seed + step)
        prompt = (history[:kept] + new)[:150]
        action = rng.random()
        if action < 0.1:
            model.logits(prompt)
            continue
        if action < 0.2:
            abandoned = model.generate(prompt)
            begun = itertools.islice(abandoned, int(rng.integers(1, 50)))
            history = prompt + ids_of(begun)
            continue
        count = int(rng.choice([1, 2, 10, 2 * CHUNK]))
        history = prompt + ids_of(iter(check_against_fresh(model, talker, prompt, count)))
        if rng.random() < 0.3:
            history = prompt


def test_abandoned_generator_does_not_disturb_the_next(model: Model, talker: Path) -> None:
    prompt = random_ids(50)
    abandoned = model.generate(prompt)
    for _ in range(10):
        next(abandoned)
    check_against_fresh(model, talker, prompt[:30] + random_ids(30, seed=1), 5)
    abandoned.close()  # type: ignore[attr-defined]
    check_against_fresh(model, talker, prompt[:30] + random_ids(30, seed=1), 5)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: next(model.generate(random_ids(30, seed=1))),
        lambda model: model.logits(random_ids(30, seed=1)),
    ],
    ids=["generate", "logits"],
)
def test_later_call_ends_an_earlier_generator(
    model: Model, talker: Path, use: Callable[[Model], object]
) -> None:
    first = model.generate(random_ids(30))
    next(first)
    use(model)
    with pytest.raises(InputError, match="expected to be the last call that uses this model"):
        next(first)
    check_against_fresh(model, talker, random_ids(30), 5)


def test_generator_that_is_not_started_disturbs_nothing(model: Model) -> None:
    prompt = random_ids(30)
    expected = ids_of(model.generate(prompt, max_tokens=6))
    first = model.generate(prompt, max_tokens=6)
    begun = [next(first).token_id]
    model.generate(random_ids(30, seed=1))
    with pytest.raises(InputError):
        model.generate([])
    assert begun + ids_of(first) == expected


def test_two_models_interleave(model: Model, other: Model) -> None:
    prompts = random_ids(30), random_ids(30, seed=1)
    expected = [ids_of(model.generate(prompt, max_tokens=20)) for prompt in prompts]
    pair = model.generate(prompts[0], max_tokens=20), other.generate(prompts[1], max_tokens=20)
    both = [(a.token_id, b.token_id) for a, b in zip(*pair, strict=True)]
    assert [list(ids) for ids in zip(*both, strict=True)] == expected


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.prefill(random_ids(60)),
        lambda model: model.logits(random_ids(60)),
        lambda model: list(model.generate(random_ids(60), max_tokens=3)),
    ],
    ids=["prefill", "logits", "generate"],
)
def test_what_is_not_a_number_is_told_and_forgotten(
    model: Model, talker: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Model], object]
) -> None:
    """Masked or not, it would spread to what is computed in the same pages later."""
    run, device = model._runner.device.run, model._runner.device

    def broken(function: str, inputs: Any, bound: Any) -> Any:
        result = run(function, inputs, bound)
        device.numpy(result)[:] = np.nan
        for array, count in zip(
            model._runner.cache.arrays, 2 * model._runner.cache.pages_used(), strict=False
        ):
            array[:count] = np.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(device, "run", broken)
        with pytest.raises(ArtifactError, match="expected finite numbers, found nan"):
            use(model)
    check_against_fresh(model, talker, random_ids(60), 3)


def test_threads_that_decode_at_the_end_of_the_context(model: Model) -> None:
    """As many go on as there is room for."""
    model.prefill(random_ids(model.context - 3))
    refused: list[InputError] = []

    def decode() -> None:
        try:
            model.decode(3)
        except InputError as error:
            refused.append(error)

    threads = [threading.Thread(target=decode) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 9 and model._sequence.length == model.context
