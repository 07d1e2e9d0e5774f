"""A choice of tools holds, whatever the model would rather say."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from talker import TOKENIZER, say
from test_chat import DATE, answer_ids, user

from osscompile.runtime import (
    Finish,
    InputError,
    Model,
    Piece,
    Reasoning,
    Text,
    ToolCall,
    calls_of,
    load,
)
from osscompile.runtime.constraint import Constraint, is_allowed
from osscompile.runtime.harmony.parse import PieceStream
from osscompile.runtime.harmony.tool_choice import read_tool_choice, tool_constraint
from osscompile.runtime.harmony.tools import read_builtin_tools, read_tools
from osscompile.runtime.tokenizer import Tokenizer

TOKENS = Tokenizer(TOKENIZER)


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiplies."""
    return a * b


def named(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


def constraint(choice: object, *builtin: str, begun: str = "") -> Constraint | None:
    functions = read_tools([named("add"), named("multiply")])
    begun_ids = [TOKENS.special["<|channel|>"], *TOKENS.encode(begun)] if begun else []
    size = TOKENS.vocab_size
    read = read_tool_choice(choice, functions, read_builtin_tools(builtin))
    return None if read is None else tool_constraint(read, TOKENS, size, begun_ids)


def draw_answer(limits: Constraint, rng: Random) -> list[Piece]:
    """What a model says that draws each token from those that may come, told as in a chat."""
    stream, pieces = PieceStream(TOKENS), list[Piece]()
    special = set(TOKENS.special.values())
    while not stream.ended:
        mask = limits.mask()
        assert mask is not None
        allowed = np.flatnonzero(is_allowed(mask, TOKENS.vocab_size)).tolist()
        ends = [id for id in allowed if id in special]
        is_text = len(allowed) > 100
        id = rng.choice(ends if ends and is_text and rng.random() < 0.2 else allowed)
        limits.push(id)
        pieces += stream.push(id)
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_required_call_comes_after_any_reasoning(seed: int) -> None:
    limits = constraint("required", "python", "browser")
    assert limits is not None
    pieces = draw_answer(limits, Random(seed))
    (call,) = [piece for piece in pieces if isinstance(piece, ToolCall)]
    names = {"add", "multiply", "python", "browser.search", "browser.open", "browser.find"}
    assert call.name in names
    assert pieces[-1] == Finish("tool_calls")
    assert not any(piece.channel == "final" for piece in pieces)


def test_required_answers_reason_first_and_call_every_tool() -> None:
    drawn = []
    for seed in range(60):
        limits = constraint("required", "python")
        assert limits is not None
        drawn.append(draw_answer(limits, Random(seed)))
    names = {piece.name for pieces in drawn for piece in pieces if isinstance(piece, ToolCall)}
    assert names == {"add", "multiply", "python"}
    assert any(isinstance(pieces[0], Reasoning) for pieces in drawn)
    assert any(isinstance(piece, Text) for pieces in drawn for piece in pieces)


@pytest.mark.parametrize("seed", range(10))
def test_call_by_name_is_this_one(seed: int) -> None:
    limits = constraint(named("multiply"), "python")
    assert limits is not None
    calls = calls_of(draw_answer(limits, Random(seed)))
    assert [call.name for call in calls] == ["multiply"]


@pytest.mark.parametrize("seed", range(20))
def test_none_calls_nothing(seed: int) -> None:
    limits = constraint("none")
    assert limits is not None
    pieces = draw_answer(limits, Random(seed))
    assert not any(isinstance(piece, ToolCall) for piece in pieces)
    assert pieces[-1] == Finish("stop")


DIGIT = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["digit"],
    "additionalProperties": False,
}
STRICT = [
    {"type": "function", "function": {"name": name, "parameters": DIGIT, "strict": True}}
    for name in ("add", "multiply")
]


@pytest.mark.parametrize("choice", ["auto", "required", "none", named("multiply")], ids=str)
def test_choice_beside_schemas(choice: Any, talker: Path) -> None:
    """Both hold: there is always a token that both allow, and at the end what both want."""
    questions = load(talker)._questions
    shape = {"type": "json_schema", "json_schema": {"name": "digit", "schema": DIGIT}}
    options = {"tools": STRICT, "tool_choice": choice, "response_format": shape}
    outcomes = set[str]()
    for seed in range(25):
        limits = questions.of_messages([user("Add 3.")], **options).constraint
        assert limits is not None
        pieces = draw_answer(limits, Random(seed))
        assert limits.error is None
        calls = calls_of(pieces)
        text = "".join(p.text for p in pieces if isinstance(p, Text) and p.channel == "final")
        for told in [text] if text else [call.text for call in calls]:
            assert set(json.loads(told)) == {"digit"}
        outcomes |= {call.name for call in calls} or {"answer"}
    possible = {
        "auto": {"add", "multiply", "answer"},
        "required": {"add", "multiply"},
        "none": {"answer"},
    }
    assert outcomes == possible.get(str(choice), {"multiply"})


def test_auto_constrains_nothing() -> None:
    assert constraint("auto") is None and constraint(None) is None


def test_answer_that_a_template_began() -> None:
    limits = constraint("required", begun="analysis")
    assert limits is not None
    limits.push(TOKENS.special["<|message|>"])
    assert calls_of(draw_answer(limits, Random(0)))
    with pytest.raises(InputError, match="leaves the answer's beginning to the model"):
        constraint("required", begun="final")


@pytest.mark.parametrize(
    "choice",
    ["any", "add", 5, {"type": "function"}, named("subtract"), {**named("add"), "type": "tool"}],
)
def test_other_choices_are_refused(choice: Any) -> None:
    with pytest.raises(InputError, match="tool_choice"):
        constraint(choice)


def test_choice_without_tools_is_refused() -> None:
    with pytest.raises(InputError, match="expected tools beside 'required', found none"):
        read_tool_choice("required", (), ())


# In a chat


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker)


def test_model_that_would_rather_answer_has_to_call(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reasons and would say `final`; where it may not, `commentary` and a recipient are next."""
    special = TOKENS.special
    said = answer_ids(TOKENS, ("analysis", "Hm", "<|end|>"), ("final", "", "<|return|>"))[:-2]
    prompts = say(model, [*said, *[special["<|call|>"]] * 60], monkeypatch)
    second = dict.fromkeys(TOKENS.encode("commentary to=functions.add"), 0.5)
    options: dict[str, Any] = {"tools": [add], "current_date": DATE, "logit_bias": second}
    pieces = list(model.chat([user("2 + 2?")], tool_choice="required", **options))
    assert [call.name for call in calls_of(pieces)] == ["add"]
    assert "".join(piece.text for piece in pieces) == "Hm"
    assert pieces[-1] == Finish("tool_calls")
    list(model.chat([user("2 + 2?")], max_tokens=1, **options))
    assert prompts[0] == prompts[1]  # a choice is no text


def test_none_tells_the_model_of_its_tools_all_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answer_ids(TOKENS, ("commentary to=functions.add", "4", "<|call|>"))
    prompts = say(model, [*said, *[TOKENS.special["<|return|>"]] * 40], monkeypatch)
    pieces = list(
        model.chat(
            [user("2 + 2?")], tools=[add], tool_choice="none", current_date=DATE, max_tokens=30
        )
    )
    assert not calls_of(pieces)
    assert "type add" in TOKENS.decode(prompts[0])


def test_one_call_ends_an_answer_that_may_not_make_several(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = answer_ids(
        TOKENS,
        ("commentary to=functions.add", '{"a": 1, "b": 2}', "<|end|>"),
        ("commentary to=functions.add", '{"a": 3, "b": 4}', "<|call|>"),
    )
    say(model, two, monkeypatch)
    options: dict[str, Any] = {"tools": [add], "current_date": DATE}
    both = list(model.chat([user("?")], **options))
    assert [call.text for call in calls_of(both)] == ['{"a": 1, "b": 2}', '{"a": 3, "b": 4}']
    one = list(model.chat([user("?")], parallel_tool_calls=False, **options))
    assert [call.text for call in calls_of(one)] == ['{"a": 1, "b": 2}']
    assert both[-1] == one[-1] == Finish("tool_calls")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice: expected tools"),
        ({"tool_choice": "add"}, "tool_choice: expected auto, none"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls: expected True or False"),
        ({"tools": [named("python")], "builtin_tools": ["python"]}, "found 'python'; rename"),
        ({"tools": [named("browser.a")], "builtin_tools": ["browser"]}, "'browser.a'; rename"),
        ({"builtin_tools": {"ruby": None}}, "builtin_tools: expected some of browser, python"),
        ({"builtin_tools": {"python": 5}}, "builtin_tools.python: expected text"),
    ],
)
def test_bad_options_of_tools_raise_before_anything_is_computed(
    model: Model, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    monkeypatch.setattr(model._runner.device, "run", None)
    with pytest.raises(InputError, match=message):
        model.chat([user("?")], **options)
