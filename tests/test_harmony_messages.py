"""Messages in the shapes that people have, and errors that name what is wrong with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harmony_texts import assistant, tool_call, user

import osscompile.nano
from osscompile.runtime.errors import InputError
from osscompile.runtime.harmony import render_chat
from osscompile.runtime.tokenizer import Tokenizer

NANO = Path(osscompile.nano.__file__).parent / "checkpoint" / "tokenizer.json"
CALL = tool_call("c1", "f", '{"a": 1}')
RENDERED_CALL = (
    "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json"
    '<|message|>{"a": 1}<|call|>'
)
END = "<|start|>assistant"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NANO)


def rendered(tokenizer: Tokenizer, *messages: dict[str, Any], **options: Any) -> str:
    """Return what follows the system message."""
    text = tokenizer.decode(render_chat(messages, tokenizer, **options))
    return text.split("<|end|>", 1)[1].removesuffix(END)


def said(channel: str, text: str) -> str:
    return f"<|start|>assistant<|channel|>{channel}<|message|>{text}<|end|>"


def test_content_as_a_list_of_text_parts(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    text = rendered(tokenizer, {"role": "user", "content": parts})
    assert text == "<|start|>user<|message|>Hello there<|end|>"
    text = rendered(tokenizer, {"role": "system", "content": parts}, user("x"))
    assert text.startswith("<|start|>developer<|message|># Instructions\n\nHello there<|end|>")


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
def test_content_without_parts_is_none(tokenizer: Tokenizer, role: str) -> None:
    with pytest.raises(InputError, match=r"messages\[0\]\.content: expected text.*, found none"):
        rendered(tokenizer, {"role": role, "content": [], "name": "f"})


def test_name_of_who_speaks(tokenizer: Tokenizer) -> None:
    assert rendered(tokenizer, {**user("Hi"), "name": "ann"}).startswith("<|start|>user:ann<|mess")
    text = rendered(tokenizer, user("Hi"), {**assistant("Yes"), "name": "bob"})
    assert "<|start|>assistant:bob<|channel|>final<|message|>Yes" in text


def test_call_without_content(tokenizer: Tokenizer) -> None:
    for content in (None, "", []):
        message = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        assert rendered(tokenizer, message) == RENDERED_CALL
    message = {"role": "assistant", "tool_calls": [CALL]}
    assert rendered(tokenizer, message) == RENDERED_CALL


def test_content_before_a_call_is_a_preamble(tokenizer: Tokenizer) -> None:
    message = {**assistant("I look."), "tool_calls": [CALL]}
    assert rendered(tokenizer, message) == said("commentary", "I look.") + RENDERED_CALL


def test_no_tool_calls_are_none(tokenizer: Tokenizer) -> None:
    for calls in ([], (), None):
        text = rendered(tokenizer, {**assistant("Yes"), "tool_calls": calls})
        assert text == said("final", "Yes")


def test_several_calls_and_their_results(tokenizer: Tokenizer) -> None:
    """Results find their function by the id, in any order."""
    calls = [CALL, tool_call("c2", "g", {"é": [1]})]
    text = rendered(
        tokenizer,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "one"}]},
    )
    second = RENDERED_CALL.replace("functions.f", "functions.g").replace('"a": 1', '"é": [1]')
    assert text == (
        f"{RENDERED_CALL}{second}"
        "<|start|>functions.g to=assistant<|channel|>commentary<|message|>two<|end|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>one<|end|>"
    )


def test_id_that_is_used_again_names_the_later_call(tokenizer: Tokenizer) -> None:
    text = rendered(
        tokenizer,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "assistant", "tool_calls": [tool_call("c1", "g", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    )
    assert "<|start|>functions.g to=assistant" in text


def test_result_with_a_name_only(tokenizer: Tokenizer) -> None:
    message = {"role": "tool", "name": "f", "content": "1"}
    assert rendered(tokenizer, message).startswith("<|start|>functions.f to=assistant")


@pytest.mark.parametrize(
    ("name", "header", "result"),
    [
        ("python", " to=python<|channel|>analysis code", "python"),
        ("browser.search", " to=browser.search<|channel|>analysis code", "browser.search"),
    ],
)
def test_call_of_a_builtin_tool(tokenizer: Tokenizer, name: str, header: str, result: str) -> None:
    """Their calls and results belong to the reasoning."""
    text = rendered(
        tokenizer,
        {"role": "assistant", "tool_calls": [tool_call("c", name, "1")]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    )
    assert text == (
        f"<|start|>assistant{header}<|message|>1<|call|>"
        f"<|start|>{result} to=assistant<|channel|>analysis<|message|>1<|end|>"
    )


def test_function_that_is_named_like_a_builtin_tool(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "python"}}]
    message = {"role": "assistant", "tool_calls": [tool_call("c", "python", "1")]}
    assert "to=functions.python<|channel|>commentary" in rendered(tokenizer, message, tools=tools)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_of_a_turn_that_goes_on(tokenizer: Tokenizer, key: str) -> None:
    text = rendered(tokenizer, {"role": "assistant", key: "Hm.", "tool_calls": [CALL]})
    assert text == said("analysis", "Hm.") + RENDERED_CALL
    assert rendered(tokenizer, {"role": "assistant", key: "Hm."}) == said("analysis", "Hm.")


def test_reasoning_that_is_there_twice_or_empty(tokenizer: Tokenizer) -> None:
    message = {**assistant("Yes", "commentary"), "reasoning": "Hm.", "reasoning_content": "Hm."}
    assert rendered(tokenizer, message) == said("analysis", "Hm.") + said("commentary", "Yes")
    text = rendered(tokenizer, {**assistant("Yes"), "reasoning": ""})
    assert text == said("final", "Yes")


def test_refusal_is_what_was_said(tokenizer: Tokenizer) -> None:
    message = {"role": "assistant", "content": None, "refusal": "No."}
    assert rendered(tokenizer, message) == said("final", "No.")
    assert rendered(tokenizer, {**assistant("Hm. "), "refusal": "No."}) == said("final", "Hm. No.")
    parts = [{"type": "refusal", "refusal": "No."}]
    assert rendered(tokenizer, {**assistant("x"), "content": parts}) == said("final", "No.")


@pytest.mark.parametrize(
    "nothing",
    [
        {"content": []},
        {"content": None},
        {"content": None, "refusal": None, "tool_calls": None},
        {"content": None, "refusal": None, "tool_calls": []},
    ],
    ids=str,
)
def test_answer_without_anything_is_empty(tokenizer: Tokenizer, nothing: dict[str, Any]) -> None:
    """What SDKs give for one that was cut by its length."""
    assert rendered(tokenizer, {"role": "assistant", **nothing}) == said("final", "")


def test_what_servers_write_beside_an_answer_is_left_out(tokenizer: Tokenizer) -> None:
    message = {**assistant("Yes"), "reasoning_details": [{"a": 1}], "provider_specific_fields": {}}
    assert rendered(tokenizer, message) == said("final", "Yes")


def test_what_an_sdk_dumps_of_an_answer(tokenizer: Tokenizer) -> None:
    """The fields of ChatCompletionMessage.model_dump() in openai 1.x and 2.x."""
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    call = {**CALL, "index": 0, "type": None}
    dumped = {"role": "assistant", "content": None, **empty, "tool_calls": [call]}
    assert rendered(tokenizer, dumped) == RENDERED_CALL
    dumped = {**assistant("Yes"), **empty, "tool_calls": None, "parsed": None}
    assert rendered(tokenizer, dumped) == said("final", "Yes")


@pytest.mark.parametrize("channel", ["commentary?", "Final", "musing", "分析"])
def test_odd_channel_is_rendered_as_it_is(tokenizer: Tokenizer, channel: str) -> None:
    assert rendered(tokenizer, assistant("x", channel)) == said(channel, "x")


def test_channel_of_a_call(tokenizer: Tokenizer) -> None:
    message = {"role": "assistant", "channel": "analysis", "content": None, "tool_calls": [CALL]}
    assert rendered(tokenizer, message) == RENDERED_CALL.replace("commentary", "analysis")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message, found an empty list"),
        ("Hello", "expected a list of dicts .* found str"),
        (user("Hello"), "expected a list of dicts .* found dict"),
        (["Hello"], r"messages\[0\]: expected a dict .* found str"),
        ([user("x"), {"role": "bot"}], r"messages\[1\]\.role: expected one of .* 'bot'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role: expected one of"),
        ([{"content": "x"}], r"messages\[0\]\.role: .* found None"),
        ([{"role": "function", "content": "x"}], r"messages\[0\]\.role: .* 'function'"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected text, found none"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: expected text .* found int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]: .* found str"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"messages\[0\]\.content\[0\]\.text: expected text, found none",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            r"content\[0\]: .* a part of type 'image_url'; this model reads text only",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            r"content\[0\]: .* 'input_audio'; this model reads text only",
        ),
        (
            [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}],
            r"content\[0\]: .* 'refusal'",
        ),
        ([{**user("x"), "channel": "final"}], r"messages\[0\]\.channel: .* role user; leave it"),
        ([{**user("x"), "tool_calls": []}], r"messages\[0\]\.tool_calls: .* role user"),
        ([{**user("x"), "name": "a b"}], r"messages\[0\]\.name: expected a word .* 'a b'"),
        ([assistant("x", "two words")], r"messages\[0\]\.channel: .* 'two words'"),
        ([assistant("x", "")], r"messages\[0\]\.channel: expected a word"),
        ([{**assistant("x"), "channel": 5}], r"messages\[0\]\.channel: .* found int"),
        ([{"role": "assistant"}], r"messages\[0\]\.content: expected text where"),
        ([{**assistant("x"), "audio": {"id": "a"}}], r"messages\[0\]\.audio"),
        ([{**assistant("x"), "function_call": {}}], r"messages\[0\]\.function_call"),
        ([{**assistant("x"), "tool_calls": "f"}], r"messages\[0\]\.tool_calls: .* found str"),
        ([{**assistant("x"), "tool_calls": ["f"]}], r"messages\[0\]\.tool_calls\[0\]: expected"),
        (
            [{**assistant("x"), "tool_calls": [{**CALL, "type": "custom"}]}],
            r"messages\[0\]\.tool_calls\[0\]: expected",
        ),
        (
            [{**assistant("x"), "tool_calls": [tool_call("c", "f g", "")]}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.name: .* 'f g'",
        ),
        (
            [{**assistant("x"), "tool_calls": [tool_call("c", "f", 5)]}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: .* found int",
        ),
        (
            [{**assistant("x"), "tool_calls": [tool_call("c", "f", {"a": {1}})]}],
            r"function\.arguments: expected what JSON can say",
        ),
        (
            [{**assistant("x"), "tool_calls": [tool_call("c", "f", {"a": float("nan")})]}],
            r"function\.arguments: expected what JSON can say",
        ),
        ([{**assistant("x"), "reasoning": ["Hm"]}], r"messages\[0\]\.reasoning: .* found list"),
        (
            [{**assistant("x"), "reasoning": "a", "thinking": "b"}],
            r"messages\[0\]: expected one reasoning, .* as reasoning and thinking",
        ),
        (
            [{"role": "tool", "content": "1"}],
            r"messages\[0\]\.tool_call_id: expected the id of a call .* found None",
        ),
        (
            [{"role": "tool", "tool_call_id": "c9", "content": "1"}],
            r"messages\[0\]\.tool_call_id: .* 'c9'",
        ),
        (
            [{"role": "tool", "name": "f", "content": None}],
            r"messages\[0\]\.content: expected text, found none",
        ),
        ([user("a\ud800")], r"messages\[0\]\.content: .* surrogate at character 1"),
        ([{**assistant("x"), "channel": "\ud800"}], r"messages\[0\]\.channel: .* surrogate"),
    ],
)
def test_malformed_messages(tokenizer: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat(messages, tokenizer)
