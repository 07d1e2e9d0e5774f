"""The chat format against openai-harmony itself, if it is installed, on the real vocabulary."""

from __future__ import annotations

import os
from typing import Any

import pytest
from harmony_texts import ANSWER, assistant, golden, marked, user
from o200k import RANKS, write_o200k

from osscompile.runtime.harmony import Piece, parse_answer, render_chat
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
    import openai_harmony as harmony

    system = harmony.SystemContent.new().with_conversation_start_date("2025-06-28")
    system = system.with_reasoning_effort(harmony.ReasoningEffort.HIGH)
    theirs = [harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system)]
    for message in messages:
        if message["role"] in ("system", "developer"):
            developer = harmony.DeveloperContent.new().with_instructions(message["content"])
            theirs.append(harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, developer))
            continue
        role = harmony.Role(message["role"])
        turn = harmony.Message.from_role_and_content(role, message["content"])
        if role == harmony.Role.ASSISTANT:
            turn = turn.with_channel(message.get("channel", "final"))
        theirs.append(turn)
    expected = oracle.render_conversation_for_completion(
        harmony.Conversation.from_messages(theirs), harmony.Role.ASSISTANT
    )
    found = render_chat(messages, o200k, reasoning="high", current_date="2025-06-28")
    assert found == expected


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
    expected = [Piece(m.channel, m.content[0].text, m.recipient) for m in theirs]
    assert parse_answer(ids, o200k) == expected


@pytest.mark.oracle
def test_golden_ids_of_an_answer(o200k: Tokenizer) -> None:
    ids = [int(id) for id in golden("simple_reasoning_response").split()]
    thought = 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
    assert parse_answer(ids, o200k) == [
        Piece("analysis", thought),
        Piece("final", "2 + 2 = 4."),
    ]
