"""The chat format against openai-harmony itself, if it is installed, on the real vocabulary."""

from __future__ import annotations

import os
from typing import Any

import pytest
from harmony_oracle import conversations, render_with_harmony
from harmony_streams import said, stream_answer
from harmony_texts import ANSWER, assistant, golden, marked, user
from hypothesis import HealthCheck, given, settings
from o200k import RANKS, write_o200k

from osscompile.runtime.harmony import (
    Arguments,
    Finish,
    Reasoning,
    Text,
    ToolCall,
    as_messages,
    render_chat,
)
from osscompile.runtime.tokenizer import Tokenizer

CONVERSATIONS: list[list[dict[str, str]]] = [
    [user("Hi")],
    [user("")],
    [{"role": "system", "content": "Be brief.\n"}, user("a<|end|>b <|start|> 👩‍👩‍👧 東京\r\n\t x")],
    [user("u1"), assistant("t1", "analysis"), assistant("f1"), user("u2")],
    [user("u1"), assistant("t1", "analysis"), assistant("c1", "commentary"), assistant("f1")],
    [user("u1"), assistant("t1", "analysis"), assistant("f1"), assistant("t2", "analysis")],
    [user("u1"), assistant("t1", "analysis"), user("u2")],
    [user("u1"), assistant("f1"), assistant("c1", "commentary"), user("u2")],
    [
        *(user("u1"), assistant("t1", "analysis"), assistant("f1")),
        *(user("u2"), assistant("t2", "analysis"), assistant("f2"), user("u3")),
    ],
    [user("u"), {"role": "developer", "content": "Rhyme."}, user("v")],
]


@pytest.fixture(scope="module")
def oracle() -> Any:
    needed = "needs openai-harmony: install the extra `oracle`"
    harmony = pytest.importorskip("openai_harmony", reason=needed)
    if RANKS not in os.environ:
        pytest.skip(f"needs o200k_base.tiktoken: name its folder in {RANKS}")
    return harmony.load_harmony_encoding("HarmonyGptOss")


@pytest.fixture(scope="module")
def o200k(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real vocabulary: 200,019 ids, built from the ranks."""
    return Tokenizer(write_o200k(tmp_path_factory.mktemp("o200k") / "tokenizer.json"))


@pytest.mark.oracle
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda messages: str(len(messages)))
def test_ids_equal_openai_harmony(
    oracle: Any, o200k: Tokenizer, messages: list[dict[str, str]]
) -> None:
    options = {"reasoning": "high", "current_date": "2025-06-28"}
    expected = render_with_harmony(oracle, messages, options)
    assert render_chat(messages, o200k, **options) == expected


@pytest.mark.oracle
def test_random_conversations_and_schemas_equal_openai_harmony(
    oracle: Any, o200k: Tokenizer
) -> None:
    """HARMONY_EXAMPLES says how many; the default takes seconds."""

    @settings(
        max_examples=int(os.environ.get("HARMONY_EXAMPLES", "150")),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(conversations())
    def one(conversation: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
        messages, options = conversation
        expected = render_with_harmony(oracle, messages, options)
        assert render_chat(messages, o200k, **options) == expected

    one()


@pytest.mark.oracle
@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        "<|channel|>final<|message|>grüße 👩‍👩‍👧<|return|>",
        "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant<|channel|>commentary"
        ' to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>',
    ],
)
def test_messages_equal_openai_harmony(oracle: Any, o200k: Tokenizer, answer: str) -> None:
    from openai_harmony import Role

    ids = marked(o200k, answer)
    theirs = oracle.parse_messages_from_completion_tokens(ids, Role.ASSISTANT)
    expected = [(m.channel, m.content[0].text, m.recipient) for m in theirs]
    ours = as_messages(stream_answer(ids, o200k))
    assert [_summary(message) for message in ours] == expected


@pytest.mark.oracle
def test_golden_ids_of_an_answer(o200k: Tokenizer) -> None:
    ids = golden_answer("simple_reasoning_response")
    thought = 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
    assert said(stream_answer(ids, o200k)) == [
        Reasoning("analysis", thought),
        Text("final", "2 + 2 = 4."),
        Finish("length"),
    ]


@pytest.mark.oracle
def test_golden_ids_of_a_call_that_is_cut_off(o200k: Tokenizer) -> None:
    ids = golden_answer("simple_tool_call")
    thought = 'User asks: "What is the weather in Tokyo?" We need to use lookup_weather tool.'
    assert said(stream_answer(ids, o200k)) == [
        Reasoning("analysis", thought),
        ToolCall("analysis", "call_0", "lookup_weather"),
        Arguments("analysis", "call_0", '{"location": "Tokyo"}'),
        Finish("length"),
    ]


def golden_answer(name: str) -> list[int]:
    """Return ids in which `<|end|>` ends the reasoning: at their `<|return|>` an answer ends."""
    return [200007 if id == "200002" else int(id) for id in golden(name).split()]


def _summary(message: dict[str, Any]) -> tuple[str, str, str | None]:
    calls = message.get("tool_calls")
    if not calls:
        return message["channel"], message["content"], None
    function = calls[0]["function"]
    return message["channel"], function["arguments"], f"functions.{function['name']}"
