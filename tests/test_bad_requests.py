"""Requests that a whole artifact cannot serve raise an error of ours. It says what was expected,
what was found and what to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import osscompile
from osscompile.runtime import Arguments, as_messages
from osscompile.runtime.errors import InputError
from osscompile.runtime.sampling_options import SamplingOptions


@pytest.fixture(scope="session")
def model(nano_artifact: Path) -> osscompile.Model:
    return osscompile.load(nano_artifact)


def test_prompt_longer_than_the_context(model: osscompile.Model) -> None:
    ids = [1] * (model.context + 1)
    for request in (model.logits, model.generate):  # both raise at the call, not at the first token
        with pytest.raises(InputError, match=r"at most 4096 tokens, found 4097; .* larger context"):
            request(ids)


def test_prompt_longer_than_the_context_of_this_load(nano_artifact: Path) -> None:
    model = osscompile.load(nano_artifact, context=8)
    assert model.logits([1] * 8).shape == (8, model.vocab_size)
    with pytest.raises(InputError, match=r"at most 8 tokens, found 9; .*compiled for 4096"):
        model.logits([1] * 9)


def test_conversation_longer_than_the_context(nano_artifact: Path) -> None:
    model = osscompile.load(nano_artifact, context=32)
    with pytest.raises(InputError, match="at most 32 tokens"):
        model.chat([{"role": "user", "content": "17 + 25? " * 100}])


def test_prompt_that_fills_the_context(nano_artifact: Path) -> None:
    """The token after the last position can be said: it needs no position of its own."""
    model = osscompile.load(nano_artifact, context=16)
    assert len(list(model.generate([5] * 16))) == 1
    assert len(list(model.generate([5] * 16, max_tokens=100))) == 1


def test_empty_prompt(model: osscompile.Model) -> None:
    for request in (model.logits, model.generate):
        with pytest.raises(InputError, match="at least one token, found none"):
            request([])


@pytest.mark.parametrize("wrong", [-1, -(1 << 63), 1 << 31, 1 << 32, 1 << 70])
def test_token_id_out_of_range(model: osscompile.Model, wrong: int) -> None:
    for request in (model.logits, model.generate):
        with pytest.raises(
            InputError, match=rf"expected 0 to {model.vocab_size - 1}, found {wrong}"
        ):
            request([1, wrong, 2])


def test_first_token_id_beyond_the_vocabulary(model: osscompile.Model) -> None:
    assert model.logits([model.vocab_size - 1]).shape == (1, model.vocab_size)
    with pytest.raises(InputError, match=f"found {model.vocab_size}"):
        model.logits([model.vocab_size])


@pytest.mark.parametrize("context", [0, -1, 4097])
def test_load_with_a_context_out_of_range(nano_artifact: Path, context: int) -> None:
    with pytest.raises(InputError, match=f"from 1 to 4096, found {context}; .*--context"):
        osscompile.load(nano_artifact, context=context)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_max_tokens_out_of_range(model: osscompile.Model, max_tokens: int) -> None:
    with pytest.raises(InputError, match=f"whole number from 1, found {max_tokens}"):
        model.generate([1], max_tokens=max_tokens)


def test_chat_without_a_tokenizer(tiny_artifact: Path) -> None:
    model = osscompile.load(tiny_artifact)
    for request in (lambda: model.encode("17"), lambda: model.chat([])):
        with pytest.raises(InputError, match=r"expected an artifact with a tokenizer.*token ids"):
            request()


def test_the_model_works_on_after_bad_requests(model: osscompile.Model) -> None:
    before = model.logits([3, 1, 4, 1, 5])
    for ids in ([], [-1], [1] * 5000):
        with pytest.raises(InputError):
            model.generate(ids)
    np.testing.assert_array_equal(model.logits([3, 1, 4, 1, 5]), before)


NO_TOKENS = (
    None,
    5,
    2.5,
    "17",
    b"17",
    bytearray(b"17"),
    [None],
    ["17"],
    [1.0],
    [float("nan")],
    [True],
    [[1]],
    {"a": 1},
    np.float32([1, 2]),
    np.array([True]),
    np.array([[1, 2]]),
    np.array([[1]]),
    np.array(1),
)


@pytest.mark.parametrize("wrong", NO_TOKENS, ids=repr)
def test_what_is_no_prompt(model: osscompile.Model, wrong: Any) -> None:
    for request in (model.logits, model.generate, model.prefill):
        with pytest.raises(InputError, match="expected token ids"):
            request(wrong)


@pytest.mark.parametrize("wrong", [None, 2.5, "1", b"1", True, [1], np.array([1])], ids=repr)
def test_what_is_no_token(model: osscompile.Model, wrong: Any) -> None:
    with pytest.raises(InputError, match="expected token ids"):
        model.decode(wrong)


@pytest.mark.parametrize("wrong", [20.5, "2", b"2", True, float("nan"), [2], -1, 0], ids=repr)
def test_what_is_no_count(model: osscompile.Model, nano_artifact: Path, wrong: Any) -> None:
    for name in ("context", "threads"):
        with pytest.raises(InputError, match=f"{name}: expected a whole number"):
            osscompile.load(nano_artifact, **{name: wrong})
    with pytest.raises(InputError, match="max_tokens: expected a whole number"):
        model.generate([1], max_tokens=wrong)


@pytest.mark.parametrize("wrong", [None, 5, b"17", ["17"]], ids=repr)
def test_what_is_no_text(model: osscompile.Model, wrong: Any) -> None:
    with pytest.raises(InputError, match="encode: expected text"):
        model.encode(wrong)


@pytest.mark.parametrize("wrong", [5, "x", True], ids=repr)
def test_progress_that_cannot_be_called(nano_artifact: Path, wrong: Any) -> None:
    with pytest.raises(InputError, match="progress: expected a function of a number of bytes"):
        osscompile.load(nano_artifact, progress=wrong)


@pytest.mark.parametrize("wrong", [10**400, (1 << 48) + 1], ids=["huge", "large"])
def test_more_memory_than_there_can_be(nano_artifact: Path, wrong: int) -> None:
    with pytest.raises(InputError, match="kv_memory: expected at most 281474976710656 bytes"):
        osscompile.load(nano_artifact, kv_memory=wrong)


CALL_WITHOUT_A_BEGINNING = [Arguments("commentary", id="call_0", delta="{}")]


@pytest.mark.parametrize("wrong", [None, 5, [5], "x", {"a": 1}, CALL_WITHOUT_A_BEGINNING], ids=repr)
def test_what_are_no_pieces(wrong: Any) -> None:
    with pytest.raises(InputError, match="pieces: expected "):
        as_messages(wrong)


@pytest.mark.parametrize("wrong", [None, 5, b"nano.osc", ["nano.osc"]], ids=repr)
def test_what_is_no_path(wrong: Any) -> None:
    with pytest.raises(InputError, match="artifact: expected the path of a folder"):
        osscompile.load(wrong)


def test_option_that_there_is_not(model: osscompile.Model) -> None:
    """The message names those that there are."""
    known = "max_tokens, temperature, .*stop, logit_bias, frequency_penalty, presence_penalty"
    text = f"^options: expected response_format, {known}, found 'top'"
    with pytest.raises(InputError, match=text):
        model.generate([1], top=5)
    with pytest.raises(InputError, match=f"^options: expected reasoning, .*{known}, found 'top'"):
        model.chat([{"role": "user", "content": "Hello"}], top=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": 5},
        {"stop": ""},
        {"stop": ["a", None]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": 1, 5: 2}},
        {"logit_bias": {5: 101}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1 << 40: 1}},
        {"frequency_penalty": 2.5},
        {"presence_penalty": "1"},
        {"logprobs": -1},
        {"temperature": 101},
    ],
    ids=str,
)
def test_option_out_of_its_range(model: osscompile.Model, wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    message = [{"role": "user", "content": "Hello"}]
    for request in (lambda: model.generate([1], **wrong), lambda: model.chat(message, **wrong)):
        with pytest.raises(InputError, match=f"^{name}: expected .*, found "):
            request()


def test_bias_of_tokens_as_json_has_it() -> None:
    bias: dict[Any, float] = {"5": 1, "07": 2, 6: 3}
    assert SamplingOptions(logit_bias=bias).logit_bias == {5: 1, 7: 2, 6: 3}


@pytest.mark.parametrize("number", [np.int8, np.uint16, np.int64], ids=lambda t: t.__name__)
def test_numbers_of_numpy_are_numbers(nano_artifact: Path, number: Any) -> None:
    model = osscompile.load(nano_artifact, context=number(64), threads=number(1))
    assert model.context == 64
    ids = np.array([5, 6, 7], number)
    assert len(list(model.generate(ids, max_tokens=number(1)))) == 1
    np.testing.assert_array_equal(model.logits(ids), model.logits([5, 6, 7]))
    model.prefill(ids)
    assert model.decode(ids[0]).shape == (model.vocab_size,)
