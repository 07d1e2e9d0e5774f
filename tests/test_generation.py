"""Generation: the choice of tokens, its end, and its text."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import copy_artifact, reseal
from reference import log_softmax
from talker import (
    CONTEXT,
    PADDING_ROWS,
    TOKENIZER,
    allowed_logits,
    ids_of,
    random_ids,
    say,
)

from osscompile.runtime import ArtifactError, InputError, Model, Usage, load
from osscompile.runtime.sampler import reserved_ids
from osscompile.runtime.sampling_options import SamplingOptions
from osscompile.runtime.tokenizer import Tokenizer

UNICODE = "naïve café, 日本語, 🙂👍🏽, Ω"


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker)


@pytest.fixture
def other(talker: Path) -> Model:
    """A second model, whose cache nothing has used."""
    return load(talker)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


def test_greedy_takes_the_best_allowed_token(model: Model, other: Model) -> None:
    prompt = random_ids(20)
    answer = ids_of(model.generate(prompt, max_tokens=60))
    logits = allowed_logits(other, prompt + answer)[len(prompt) - 1 : -1]
    assert answer == logits.argmax(axis=1).tolist()
    assert len(set(answer)) > 5


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-9}]
)
def test_options_that_leave_only_the_best_token(model: Model, options: dict[str, float]) -> None:
    prompt = random_ids(20)
    greedy = ids_of(model.generate(prompt, max_tokens=30))
    options = {"temperature": 2.0, **options}
    assert ids_of(model.generate(prompt, max_tokens=30, **options)) == greedy


def test_the_seed_decides_what_is_drawn(model: Model) -> None:
    def draw(seed: int) -> list[int]:
        return ids_of(model.generate(random_ids(20), max_tokens=30, temperature=1.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_drawn_tokens_are_within_top_k(model: Model, other: Model) -> None:
    prompt = random_ids(20)
    answer = ids_of(model.generate(prompt, max_tokens=60, temperature=5.0, top_k=4, seed=0))
    logits = allowed_logits(other, prompt + answer)[len(prompt) - 1 : -1]
    best = np.argsort(-logits, axis=1)[:, :4].tolist()
    ranks = [row.index(token) for row, token in zip(best, answer, strict=True)]
    assert set(ranks) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_those_of_the_allowed_tokens(
    model: Model, other: Model, temperature: float
) -> None:
    """They are of the model's own distribution at any temperature."""
    prompt = random_ids(20)
    tokens = list(
        model.generate(prompt, max_tokens=40, temperature=temperature, seed=3, logprobs=3)
    )
    answer = [token.token_id for token in tokens]
    logprobs = log_softmax(allowed_logits(other, prompt + answer)[len(prompt) - 1 : -1])
    for token, row in zip(tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-4)
        best = np.sort(row)[::-1][:3]
        assert [p for _, p in token.top_logprobs] == pytest.approx(best.tolist(), abs=1e-4)
        assert [row[i] for i, _ in token.top_logprobs] == pytest.approx(best.tolist(), abs=1e-4)


def test_reserved_ids_never_appear(model: Model, other: Model, tokenizer: Tokenizer) -> None:
    reserved = set(reserved_ids(tokenizer.special, model.vocab_size, tokenizer.vocab_size).tolist())
    assert len(reserved) > PADDING_ROWS
    prompt, said = random_ids(20), set()
    for seed in range(5):
        said |= set(ids_of(model.generate(prompt, max_tokens=100, temperature=3.0, seed=seed)))
    tempted = other.logits(random_ids(100)).argmax(axis=1).tolist()
    assert sum(i in reserved for i in tempted) > 50
    assert len(said) > 50 and not said & reserved


@pytest.mark.parametrize("count", [1, 2, 30])
def test_max_tokens_is_the_number_of_tokens(model: Model, count: int) -> None:
    assert len(list(model.generate(random_ids(20), max_tokens=count))) == count


@pytest.mark.parametrize("room", [0, 1, 5])
def test_generation_ends_with_the_context(model: Model, other: Model, room: int) -> None:
    """The last token needs no position of its own."""
    prompt = random_ids(CONTEXT - room)
    answer = ids_of(model.generate(prompt))
    assert len(answer) == room + 1
    best = allowed_logits(other, (prompt + answer)[:-1]).argmax(axis=1)
    assert answer == best[len(prompt) - 1 :].tolist()
    assert len(list(model.generate(prompt, max_tokens=1000))) == room + 1


def test_load_with_a_smaller_context(talker: Path) -> None:
    model = load(talker, context=24)
    assert len(list(model.generate(random_ids(20)))) == 5
    with pytest.raises(InputError, match="at most 24 tokens, found 25"):
        model.generate(random_ids(25))


@pytest.mark.parametrize("context", [0, -1, CONTEXT + 1])
def test_load_with_an_impossible_context(talker: Path, context: int) -> None:
    with pytest.raises(
        InputError, match=f"context: expected a whole number from 1 to {CONTEXT}, found {context}"
    ):
        load(talker, context=context)


@pytest.mark.parametrize("threads", [0, -1])
def test_load_with_an_impossible_number_of_threads(talker: Path, threads: int) -> None:
    with pytest.raises(
        InputError, match=f"threads: expected a whole number from 1, found {threads}"
    ):
        load(talker, threads=threads)


def test_custom_stop_id_is_the_last_token(model: Model) -> None:
    prompt = random_ids(20)
    answer = ids_of(model.generate(prompt, max_tokens=40))
    stop = answer[25]
    end = answer.index(stop) + 1
    assert ids_of(model.generate(prompt, max_tokens=40, stop_ids=frozenset({stop}))) == answer[:end]


def test_stop_id_of_the_manifest(model: Model, talker: Path, tmp_path: Path) -> None:
    prompt = random_ids(20)
    answer = ids_of(model.generate(prompt, max_tokens=40))
    copy = copy_artifact(talker, tmp_path)
    reseal(copy, lambda fields: fields.update(eos_token_ids=[answer[10]]))
    end = answer.index(answer[10]) + 1
    assert ids_of(load(copy).generate(prompt, max_tokens=40)) == answer[:end]


@pytest.mark.parametrize("name", ["<|return|>", "<|call|>", "<|endoftext|>"])
def test_stop_tokens_of_the_tokenizer(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    said = [5, tokenizer.special["<|end|>"], 6, tokenizer.special[name], 7]
    say(model, said, monkeypatch)
    assert ids_of(model.generate([1, 2])) == said[:4]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token, found none"),
        (random_ids(CONTEXT + 1), {}, f"at most {CONTEXT} tokens, found {CONTEXT + 1}"),
        ([1, -1], {}, "found -1"),
        ([1, 10**6], {}, "found 1000000"),
        ("Hello", {}, "expected token ids, which `encode` makes of text"),
        ([1, 2.5], {}, "'float' object cannot be"),
        (5, {}, "'int' object is not iterable"),
        ([1, "a"], {}, "'str' object cannot be"),
        ([1], {"max_tokens": 0}, "max_tokens: expected a whole number from 1, found 0"),
        ([1], {"max_tokens": 2.5}, "max_tokens: expected a whole number from 1, found 2.5"),
        ([1], {"temperature": -1.0}, "temperature: expected"),
        ([1], {"top_p": 0.0}, "top_p: expected"),
        ([1], {"stop_ids": 5}, "stop_ids: expected token ids"),
        ([1], {"stop": ""}, "stop: expected a string"),
        ([1], {"logit_bias": {10**6: 1}}, "logit_bias: expected token ids below .*, found 1000000"),
    ],
)
def test_bad_arguments_raise_before_anything_is_computed(
    model: Model, monkeypatch: pytest.MonkeyPatch, prompt: Any, options: Any, message: str
) -> None:
    monkeypatch.setattr(model._runner.device, "run", None)
    with pytest.raises(InputError, match=message):
        model.generate(prompt, **options)  # raises before any iteration


def test_characters_of_several_tokens_stream_whole(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode(UNICODE)
    say(model, ids, monkeypatch)
    texts = [token.text for token in model.generate([1], max_tokens=len(ids))]
    assert "".join(texts) == UNICODE
    assert "" in texts and not any("\ufffd" in text for text in texts)


def test_character_that_max_tokens_cuts_is_replaced(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("a🙂")
    say(model, ids, monkeypatch)
    texts = [token.text for token in model.generate([1], max_tokens=len(ids) - 1)]
    assert "".join(texts) == "a\ufffd"


def test_character_that_a_stop_id_cuts_is_replaced(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("a🙂")
    say(model, ids, monkeypatch)
    tokens = list(model.generate([1], max_tokens=40, stop_ids=[ids[-2]]))
    assert [token.token_id for token in tokens] == ids[:-1]
    assert "".join(token.text for token in tokens) == "a\ufffd"


def test_text_of_random_tokens_is_that_of_all_but_the_end(
    model: Model, tokenizer: Tokenizer
) -> None:
    *tokens, last = model.generate(random_ids(20), max_tokens=200, temperature=2.0, seed=0)
    assert (last.finish_reason, last.text) == ("stop", "")
    text = tokenizer.decode(token.token_id for token in tokens)
    assert "".join(token.text for token in tokens) == text


def test_every_answer_tells_why_it_ended_and_what_it_took(model: Model) -> None:
    prompt = random_ids(100)
    tokens = list(model.generate(prompt, max_tokens=5))
    assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]
    assert [token.usage for token in tokens] == [Usage(100, 0, n) for n in range(1, 6)]
    stop = tokens[2].token_id
    first = next(i for i, token in enumerate(tokens, 1) if token.token_id == stop)
    *_, last = model.generate(prompt, max_tokens=first, stop_ids=[stop])
    assert last.finish_reason == "stop"  # though max_tokens would have ended it too
    cached = model.cached_tokens
    assert 0 < cached < 100 and last.usage == Usage(100, cached, first)


def test_answer_that_the_contexts_end_cuts(model: Model) -> None:
    tokens = list(model.generate(random_ids(CONTEXT - 2)))
    assert [token.finish_reason for token in tokens] == [None, None, "length"]


def test_stop_string_across_tokens_is_not_shown(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("What is 17 + 25? It is more.")
    say(model, ids, monkeypatch)
    for stop in ("7 + 2", ["!", "7 + 2"], ("?", "7 + 2")):
        tokens = list(model.generate([1], max_tokens=len(ids), stop=stop))
        assert "".join(token.text for token in tokens) == "What is 1"
        assert tokens[-1].finish_reason == "stop" and tokens[-1].usage.completion_tokens < len(ids)
        assert "7 + 2" in tokenizer.decode(ids_of(iter(tokens)))
        assert "7 + 2" not in tokenizer.decode(ids_of(iter(tokens[:-1])))


def test_stop_string_that_only_begins_is_shown_at_the_end(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("It is 17 + 25")
    say(model, ids, monkeypatch)
    tokens = list(model.generate([1], max_tokens=len(ids), stop="25?"))
    assert "".join(token.text for token in tokens) == "It is 17 + 25"
    assert tokens[-1].text.endswith("25") and tokens[-1].finish_reason == "length"


def test_stop_string_in_a_character_of_several_tokens(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("a🙂b")
    say(model, ids, monkeypatch)
    tokens = list(model.generate([1], max_tokens=len(ids), stop="🙂"))
    assert "".join(token.text for token in tokens) == "a"
    assert ids_of(iter(tokens)) == ids[:-1]


def test_sampling_is_as_the_artifact_says_unless_a_caller_does(
    model: Model, talker: Path, tmp_path: Path
) -> None:
    copy = copy_artifact(talker, tmp_path)
    reseal(copy, lambda fields: fields["sampling"].update(temperature=5.0, top_k=50))
    warm, prompt = load(copy), random_ids(20)

    def said(which: Model, **options: Any) -> list[int]:
        return ids_of(which.generate(prompt, max_tokens=20, seed=1, **options))

    drawn = said(model, temperature=5.0, top_k=50)
    assert said(warm) == drawn == said(warm, temperature=None)
    assert said(warm, temperature=0) == said(model) != drawn
    assert said(warm, top_k=0) == said(model, temperature=5.0) != drawn
    assert said(warm, top_k=1) == said(model)


def test_bias_and_penalties_are_the_hosts(model: Model) -> None:
    prompt = random_ids(20)
    best = ids_of(model.generate(prompt, max_tokens=1))[0]
    banned = ids_of(model.generate(prompt, max_tokens=20, logit_bias={best: -100}))
    assert best not in banned
    forced = ids_of(model.generate(prompt, max_tokens=20, logit_bias={np.int32(5): 100}))
    assert forced == [5] * 20
    varied = ids_of(
        model.generate(
            prompt, max_tokens=20, logit_bias={5: 100, 6: 99.5, 7: 99}, frequency_penalty=1
        )
    )
    assert {5, 6, 7} <= set(varied)


def test_option_that_is_none_is_as_if_it_were_not_given(model: Model) -> None:
    prompt = random_ids(20)
    nothing = {field.name: None for field in fields(SamplingOptions)}
    expected = list(model.generate(prompt))
    assert list(model.generate(prompt, max_tokens=None, **nothing)) == expected


def test_artifact_without_tokenizer(tiny_artifact: Path) -> None:
    model = load(tiny_artifact)
    assert [token.text for token in model.generate([1, 2, 3], max_tokens=3)] == ["", "", ""]
    with pytest.raises(InputError, match="chat: expected an artifact with a tokenizer"):
        model.chat([{"role": "user", "content": "Hello"}])
    with pytest.raises(InputError, match="encode: expected an artifact with a tokenizer"):
        model.encode("Hello")
    with pytest.raises(InputError, match="stop: expected an artifact with a tokenizer"):
        model.generate([1], stop="a")


def test_decode_goes_on_after_prefill(tiny_artifact: Path) -> None:
    model = load(tiny_artifact)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = model.logits(ids)
    model.forget()
    steps = [model.prefill(ids[:3]), *(model.decode(token) for token in ids[3:])]
    np.testing.assert_allclose(np.stack(steps), expected[2:], atol=1e-4)


def test_decode_at_the_end_of_the_context(tiny_artifact: Path) -> None:
    model = load(tiny_artifact, context=4)
    model.prefill([1, 2, 3, 4])
    with pytest.raises(InputError, match="context of 4"):
        model.decode(5)
    model.forget()
    assert np.isfinite(model.decode(5)).all()


def test_logits_that_are_not_numbers_do_not_spoil_the_next_answer(tiny_artifact: Path) -> None:
    model = load(tiny_artifact)
    fresh = [token.token_id for token in model.generate([1, 2, 3], max_tokens=4, temperature=0)]
    model.prefill([1, 2, 3])
    for array in model._runner.cache.arrays:
        array[:, 0] = np.nan
    with pytest.raises(ArtifactError, match="finite"):
        list(model.generate([1, 2, 3, 4], max_tokens=4, temperature=0))
    assert [
        token.token_id for token in model.generate([1, 2, 3], max_tokens=4, temperature=0)
    ] == fresh
