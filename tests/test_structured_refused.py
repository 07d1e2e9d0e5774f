"""Structured answers: what is not supported is named before anything is computed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from walks import of_schema
from wishes import ANN, DIGITS, FINAL, LOOKUP, QUESTION, Ask, Wish, asker

from osscompile.runtime import InputError, Model, load

NAMED = {"name": "ann", "schema": ANN}


def lark(definition: str) -> dict[str, str]:
    return {"type": "grammar", "syntax": "lark", "definition": definition}


def regex(definition: str) -> dict[str, str]:
    return {"type": "grammar", "syntax": "regex", "definition": definition}


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker)


@pytest.fixture
def ask(model: Model, monkeypatch: pytest.MonkeyPatch) -> Ask:
    return asker(model, monkeypatch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"type": "json"}}, r"response_format: expected .*json_object"),
        ({"response_format": {"type": "grammar", "syntax": "gbnf"}}, "syntax: expected one of"),
        (
            {"response_format": {"type": "grammar", "syntax": "regex", "definition": ""}},
            "definition: expected a regex",
        ),
        (
            {"response_format": {"type": "grammar", "syntax": "regex", "definition": "("}},
            "response_format: expected what llguidance supports",
        ),
        (
            {"response_format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
            "response_format: expected what llguidance supports",
        ),
        (
            {
                "response_format": {
                    "type": "grammar",
                    "syntax": "lark",
                    "definition": 'start: "<|end|>" <|end|> // <|call|>',
                }
            },
            r"expected a grammar of text, found the special token <\|end\|>",
        ),
        (
            {"response_format": {"type": "json_object", "schema": ANN}},
            "expected type, found 'schema'",
        ),
        ({"response_format": {"type": "text", "schema": ANN}}, "expected type, found 'schema'"),
        ({"response_format": of_schema(ANN) | {"strict": True}}, "json_schema, found 'strict'"),
        ({"response_format": DIGITS | {"regex": "a"}}, "definition, found 'regex'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED | {"type": "object"}}},
            r"response_format\.json_schema: expected name, .* found 'type'",
        ),
        ({"response_format": of_schema(NAMED)}, r"json_schema\.schema: .* what is in its 'schema'"),
        ({"response_format": of_schema(of_schema(ANN))}, "what is in its 'json_schema'"),
        ({"response_format": of_schema({"type": 3})}, r"schema\.type"),
        ({"response_format": of_schema({"not": {}})}, "not"),
        ({"response_format": of_schema({"if": {}, "then": False})}, "if"),
        ({"response_format": of_schema({"uniqueItems": True})}, "uniqueItems"),
        ({"response_format": of_schema({"oneOf": [ANN, {"minItems": 2}]})}, "Use anyOf"),
        ({"response_format": of_schema({"const": ["a\0"]})}, r"control characters .*x00"),
        ({"response_format": of_schema({"pattern": r"^\x1bz"})}, "control characters"),
        ({"response_format": of_schema({"patternProperties": {"a\\": {}}})}, "within an escape"),
        ({"response_format": regex("\\")}, "response_format: .* within an escape"),
        ({"response_format": regex("a" + 3 * "\\")}, "within an escape"),
        # What is too large does not show at the first token.
        ({"response_format": regex("a{1000000}")}, "too many expressions"),
        ({"response_format": regex("(a{1000}){1000}")}, "too many expressions"),
        ({"response_format": lark('start: "a" start')}, "Too many items"),
        ({"response_format": lark('start: "a"~100000')}, "Too many items"),
        ({"response_format": of_schema({"type": "string", "format": "colour"})}, "colour"),
        ({"response_format": of_schema({"$ref": "https://a.b/c"})}, "a.b/c"),
        ({"response_format": of_schema({"$ref": "#/$defs/none"})}, "none"),
        ({"response_format": of_schema({"minProperties": 2})}, "minProperties"),
        ({"response_format": of_schema({"enum": []})}, "response_format"),
        ({"response_format": of_schema({"$ref": "#"})}, "one that no text obeys"),
        ({"response_format": of_schema({"pattern": "x" * (1 << 18)})}, "letters"),
        ({"response_format": DIGITS, "stop": "3"}, "stop: expected none beside response_format"),
        ({"response_format": DIGITS, "stop_ids": [3]}, "stop_ids: expected none"),
        ({"tools": [LOOKUP], "stop_ids": [3]}, "stop_ids: expected none beside strict"),
    ],
)
def test_what_is_not_supported_is_named_before_anything_is_computed(
    model: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    wish = Wish(model, "", "<|return|>", monkeypatch)
    with pytest.raises(InputError, match=message):
        list(model.chat(QUESTION, **options))
    if "tools" not in options:
        with pytest.raises(InputError, match=message):
            list(model.generate([1], **options))
    assert wish.prompts == []


def test_strict_is_a_truth_value_or_its_text(ask: Ask) -> None:
    for strict in (True, "true"):
        tools = [{"type": "function", "function": LOOKUP["function"] | {"strict": strict}}]
        call = "<|channel|>commentary to=functions.lookup<|message|>Bern<|call|>"
        assert ask(call, tools=tools)[0]["lookup"].startswith("{")
    for strict in ("yes", 1, [True]):
        tools = [{"type": "function", "function": LOOKUP["function"] | {"strict": strict}}]
        with pytest.raises(InputError, match=r"tools\[0\]\.function\.strict: expected true or"):
            ask("", tools=tools)
        schema = of_schema(ANN)
        schema["json_schema"]["strict"] = strict
        with pytest.raises(InputError, match=r"json_schema\.strict: expected true or false"):
            ask("", response_format=schema)


def test_schemas_of_strict_tools_are_checked_by_name(ask: Ask) -> None:
    function = LOOKUP["function"] | {"parameters": {"not": {}}}
    with pytest.raises(InputError, match="parameters of lookup: expected"):
        ask("", tools=[{"type": "function", "function": function}])
    ask(FINAL, tools=[{"type": "function", "function": function | {"strict": False}}])


@pytest.mark.parametrize("kind", ["integer", ["string", "null"]])
def test_strict_parameters_that_are_no_object(ask: Ask, kind: object) -> None:
    function = LOOKUP["function"] | {"parameters": {"type": kind}}
    with pytest.raises(InputError, match=r"function\.parameters\.type: expected object, found"):
        ask("", tools=[{"type": "function", "function": function}])


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"type": ["object", "null"]},
        {"anyOf": [{"type": "integer"}, {"type": "object"}]},
        {"$defs": {"x": {"type": ["object", "integer"]}}, "$ref": "#/$defs/x"},
        {"properties": {"city": {"type": "string"}}},
    ],
)
def test_strict_arguments_are_an_object(ask: Ask, parameters: dict[str, Any]) -> None:
    function = LOOKUP["function"] | {"parameters": parameters}
    call = "<|channel|>commentary to=functions.lookup<|message|>5<|call|>"
    said, _ = ask(call, tools=[{"type": "function", "function": function}])
    assert isinstance(json.loads(said["lookup"]), dict)


def test_a_schema_of_a_thousand_levels(ask: Ask) -> None:
    schema: dict[str, Any] = {}
    for _ in range(1000):
        schema = {"items": schema}
    with pytest.raises(InputError, match=r"levels|recursion"):
        ask("", response_format=of_schema(schema))


def test_without_llguidance(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'llguidance"):
        model.chat(QUESTION, response_format={"type": "json_object"})
    model.chat(QUESTION, response_format={"type": "text"})
