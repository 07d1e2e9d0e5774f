"""The nano that ships, compiled as users compile it, on tasks that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import osscompile.nano
from osscompile.nano.cases import (
    MAX_NEW_TOKENS,
    Case,
    accuracy,
    analysis_of,
    complete,
    held_out_cases,
    judge,
)
from osscompile.nano.dialogues import EFFORTS, WINDOW
from osscompile.runtime import Model, load

NUM_CASES = 200  # per category
MIN_ACCURACY = 95.0  # percent
MIN_ACCURACY_OF_LOOPS = 90.0  # two calls have two names and two results to copy
SEED = 11


@pytest.fixture(scope="module")
def nano(nano_artifact: Path) -> Model:
    return load(nano_artifact)


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """A tokenizer that, unlike the runtime's, turns special tokens in a text into their ids."""
    checkpoint = Path(osscompile.nano.__file__).parent / "checkpoint"
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def answers(model: Model, tokenizer: Tokenizer, cases: list[Case]) -> list[str]:
    """Answer greedily, with special tokens as text."""

    def generate(prompt: list[int]) -> list[int]:
        return [token.token_id for token in model.generate(prompt, max_tokens=MAX_NEW_TOKENS)]

    return complete(generate, tokenizer, cases)


@pytest.mark.parametrize("reasoning", EFFORTS)
def test_sum_of_the_readme(nano: Model, reasoning: str) -> None:
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    pieces = list(nano.chat(messages, reasoning=reasoning))
    assert "42" in "".join(piece.text for piece in pieces if piece.channel == "final")


@pytest.mark.parametrize(
    "category", ["arithmetic", "tool_call", "tool_result", "tool_loop", "json", "recall"]
)
def test_held_out_cases(
    nano: Model, backend: Tokenizer, category: str, record_property: Callable[[str, object], None]
) -> None:
    cases = held_out_cases(category, NUM_CASES, SEED)
    texts = answers(nano, backend, cases)
    verdicts = [judge(case, text) for case, text in zip(cases, texts, strict=True)]
    record_property("accuracy", accuracy(verdicts))
    print(f"{category}: {accuracy(verdicts):.0f} %")
    wrong = [text for text, right in zip(texts, verdicts, strict=True) if not right]
    least = MIN_ACCURACY_OF_LOOPS if category == "tool_loop" else MIN_ACCURACY
    assert accuracy(verdicts) >= least, wrong
    if category == "tool_call":
        assert all(text.endswith("<|call|>") for text in texts if text not in wrong)


def test_recall_cases_reach_beyond_the_window(backend: Tokenizer) -> None:
    """They need the full attention layers: the answer repeats a sentence of the prompt that ended
    before the last window."""
    for case in held_out_cases("recall", NUM_CASES, SEED):
        answer = case.expected.split("<|message|>")[-1].removesuffix("<|return|>")
        end = case.prompt.rindex(answer) + len(answer)
        window = case.prompt_ids(backend)[-WINDOW:]
        seen = backend.decode(window, skip_special_tokens=False)
        assert case.prompt.endswith(seen) and end <= len(case.prompt) - len(seen), case.prompt


def test_effort_is_the_length_of_the_analysis(nano: Model, backend: Tokenizer) -> None:
    lengths = []
    for effort in EFFORTS:
        cases = held_out_cases("arithmetic", 20, SEED, effort)
        analyses = [analysis_of(text) for text in answers(nano, backend, cases)]
        lengths.append(sum(len(backend.encode(text).ids) for text in analyses) / len(cases))
    print(f"analysis tokens: {lengths}")
    low, medium, high = lengths
    assert low < medium < high


def test_conversation_keeps_its_thread(nano: Model, nano_artifact: Path) -> None:
    """Each answer from the reused cache is that of a model that reads the conversation anew."""
    messages = []
    for question in ("What is 17 + 25?", "Hello!", "What is 9 + 8?"):
        messages.append({"role": "user", "content": question})
        pieces = list(nano.chat(messages, reasoning="low", current_date="2026-01-01"))
        fresh = load(nano_artifact)
        assert pieces == list(fresh.chat(messages, reasoning="low", current_date="2026-01-01"))
        final = "".join(piece.text for piece in pieces if piece.channel == "final")
        assert final
        messages.append({"role": "assistant", "content": final})
