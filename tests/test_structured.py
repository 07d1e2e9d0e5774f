"""Structured answers: what a model says that would rather say something else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from talker import TOKENIZER
from walks import of_schema

from osscompile.runtime import (
    Engine,
    Finish,
    GeneratedToken,
    InputError,
    Model,
    OsscompileError,
    Piece,
    as_messages,
    grammar,
    load,
)
from osscompile.runtime.harmony import render_chat
from osscompile.runtime.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "How old is Ann, 33, and is she happy?"}]
ANN: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "happy": {"type": "boolean"}},
    "required": ["age", "happy"],
    "additionalProperties": False,
}
LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
DIGITS = {"type": "grammar", "syntax": "regex", "definition": "[0-9]{1,3}"}


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text, in which names of special tokens stand for them."""
    ids: list[int] = []
    while text:
        found = {text.find(name): name for name in tokenizer.special if name in text}
        at = min(found, default=len(text))
        name = found.get(at, "")
        ids += [*tokenizer.encode(text[:at]), *([tokenizer.special[name]] if name else [])]
        text = text[at + len(name) :]
    return ids


OTHERS = ("<|end|>", "}", "0", '"')


class Wish:
    """A network that wants to say `text`, whatever came before, and then `last` for ever. Where it
    must not say what it wants, it says the first of OTHERS that it may, and wishes on."""

    def __init__(self, model: Model, text: str, last: str, patch: pytest.MonkeyPatch) -> None:
        assert model.tokenizer is not None
        self._vocab_size = model.vocab_size
        self._wanted = spelled(model.tokenizer, text)
        (self._last,) = spelled(model.tokenizer, last)
        self._others = [id for text in OTHERS for id in spelled(model.tokenizer, text)]
        self.prompts: list[list[int]] = []
        self.said: list[int] = []  # but the last, which nothing follows
        patch.setattr(model, "_prefill", self._start)
        patch.setattr(model, "_decode", self._next)

    def _start(self, prompt: list[int]) -> NDArray[np.float32]:
        self.prompts.append(prompt)
        return self._logits()

    def _next(self, token_id: int) -> NDArray[np.float32]:
        self.said.append(token_id)
        return self._logits()

    def _logits(self) -> NDArray[np.float32]:
        logits = np.zeros((1, self._vocab_size), np.float32)
        wanted = self._wanted[len(self.said) :]
        logits[0, self._others] = np.linspace(2, 1, len(self._others))
        logits[0, wanted[0] if wanted else self._last] = 3
        return logits


Ask = Callable[..., tuple[dict[str, str], Finish]]


@pytest.fixture
def ask(model: Model, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Ask a model that wishes for a text, and then for `last`: what it says by channel, and how it
    ends."""

    assert model.tokenizer is not None
    special = model.tokenizer.special

    def asked(text: str, last: str = "<|return|>", **options: Any) -> tuple[dict[str, str], Finish]:
        wish = Wish(model, text, last, monkeypatch)
        pieces = list(model.chat(QUESTION, **options))
        assert isinstance(pieces[-1], Finish)
        if pieces[-1].reason == "tool_calls":  # only `<|call|>` ends one, and then nothing follows
            arguments = wish.said[::-1][: wish.said[::-1].index(special["<|message|>"])]
            assert not {*arguments} & {*special.values()}
        return texts(pieces), pieces[-1]

    return asked


def texts(pieces: Sequence[Piece]) -> dict[str, str]:
    """By channel; of a call its arguments by its name."""
    said: dict[str, str] = {}
    for message in as_messages(pieces):
        channel, content = str(message["channel"]), str(message["content"])
        for call in message.get("tool_calls", ()):  # type: ignore[attr-defined]
            channel, content = call["function"]["name"], call["function"]["arguments"]
        assert channel not in said  # nothing is said twice
        said[channel] = content
    return said


def text_of(tokens: Iterable[GeneratedToken]) -> str:
    """Without the token that ends it."""
    *said, last = tokens
    assert last.finish_reason == "stop"
    return "".join(token.text for token in said)


def analysis(text: str) -> str:
    return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"


ANSWER = '{"age": 33, "happy": true}'
FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    "header",
    ["<|channel|>final", "<|channel|>final <|constrain|>json", "<|channel|>final json"],
)
def test_an_answer_that_obeys_is_left_as_it_is(ask: Ask, header: str) -> None:
    text = f"{analysis('Ann is 33.')}{header}<|message|>{ANSWER}<|return|>"
    said, end = ask(text, response_format=of_schema(ANN))
    assert said == {"analysis": "Ann is 33.", "final": ANSWER}
    assert end.reason == "stop"


@pytest.mark.parametrize(
    "wish",
    [
        "Ann is 33.",  # without a header
        "<|return|>",
        "<|end|>",
        "<|call|>",
        "<|endoftext|>",
        "<|message|>Ann is 33.<|return|>",
        "<|channel|>Final!<|message|>Ann",
        "<|channel|><|channel|><|channel|>",
        "user<|message|>Ann",
        "<|channel|>commentary<|message|>Ann is 33.<|return|>",
        "<|channel|>commentary to=functions.made_up<|message|>{}<|call|>",
        " to=functions.made_up<|channel|>commentary<|message|>{}<|call|>",
        f"{FINAL}Ann is 33.<|return|>",
        f"{FINAL}{{<|return|>",
        f"{FINAL}{{<|end|><|start|>assistant{FINAL}Ann is 33.",
        f"{FINAL}{{<|channel|>analysis<|message|>Let me see.",
        f"{FINAL}{{<|start|>user<|message|>",
        f"{FINAL}{ANSWER}<|end|><|start|>assistant{FINAL}Ann is 33.<|return|>",
        f"{FINAL}{ANSWER} So be it.<|return|>",
        f"<|channel|>final <|constrain|>xml<|message|>{ANSWER}",
    ],
)
@pytest.mark.parametrize("begin", ["", "Let me see."])
def test_ways_out(ask: Ask, begin: str, wish: str) -> None:
    said, end = ask((analysis(begin) if begin else "") + wish, response_format=of_schema(ANN))
    assert end.reason == "stop"
    jsonschema.validate(json.loads(said["final"]), ANN)
    assert said.get("analysis", "").startswith(begin)
    assert said.keys() <= {"analysis", "final"}


def test_the_analysis_is_free_of_a_grammar_of_digits(ask: Ask) -> None:
    thoughts = "Let me see: <b>{]}\n\n\t" + "  " * 50
    said, end = ask(f"{analysis(thoughts)}{FINAL}It is 33.", response_format=DIGITS)
    assert said["analysis"] == thoughts
    assert said["final"].isdigit()
    assert end.reason == "stop"


def test_an_analysis_does_not_end_the_answer(ask: Ask) -> None:
    said, _ = ask("<|channel|>analysis<|message|>Hm.<|return|>!<|end|>", response_format=DIGITS)
    assert said["analysis"].startswith("Hm.") and said["final"].isdigit()


@pytest.mark.parametrize("last", [" ", "\n", "1", "0", "\t"])
@pytest.mark.parametrize("first", ['{"age": ', "{\n", '{"age": 3'])
@pytest.mark.parametrize(
    "response_format",
    [{"type": "json_object"}, of_schema({"type": "object", "required": ["n"]}), of_schema(ANN)],
)
def test_blanks_and_digits_without_an_end(
    ask: Ask, first: str, last: str, response_format: dict[str, Any]
) -> None:
    """There is no limit but the context's."""
    said, end = ask(FINAL + first, last, response_format=response_format)
    assert isinstance(json.loads(said["final"]), dict)
    assert end.reason == "stop" and end.usage.completion_tokens < 120


def test_a_limit_that_is_too_short_says_so(ask: Ask) -> None:
    text = f"{analysis('Ann. ' * 30)}{FINAL}{ANSWER}"
    schema = of_schema(ANN)
    schema["json_schema"]["strict"] = "true"
    said, end = ask(text, response_format=schema, max_tokens=80, reasoning="high")
    assert end.reason == "length" and "final" not in said
    said, end = ask(f"{FINAL}{ANSWER}", response_format=schema, max_tokens=10)
    assert end.reason == "length" and ANSWER.startswith(said["final"])
    assert 0 < len(said["final"]) < len(ANSWER)


def test_calls_and_answers_beside_each_other(ask: Ask) -> None:
    options = {"response_format": of_schema(ANN), "tools": [LOOKUP]}
    call = "<|channel|>commentary to=functions.lookup <|constrain|>json<|message|>"
    said, end = ask(f'{analysis("Hm.")}{call}{{"city": "Bern"}}<|call|>', **options)
    assert said == {"analysis": "Hm.", "lookup": '{"city": "Bern"}'}
    assert end.reason == "tool_calls"
    preamble = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
    said, _ = ask(f'{preamble}{call}{{"city": "Rome"}}<|call|>', **options)
    assert said == {"commentary": "I look it up.", "lookup": '{"city": "Rome"}'}
    said, end = ask(f"{preamble}{FINAL}{ANSWER}<|return|>", **options)
    assert said == {"commentary": "I look it up.", "final": ANSWER}
    assert end.reason == "stop"


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.lookup <|constrain|>json",
        "<|channel|>commentary to=functions.lookup json",
        "<|channel|>commentary to=functions.lookup",
        " to=functions.lookup<|channel|>commentary <|constrain|>json",
        " to=functions.lookup<|channel|>commentary json",
    ],
)
@pytest.mark.parametrize("end_of_call", ["<|call|>", "<|end|>", "<|return|>", "}", "x"])
def test_strict_arguments(ask: Ask, header: str, end_of_call: str) -> None:
    wish = f'{header}<|message|>{{"city": "Oslo", "x": 1}}{end_of_call}'
    said, end = ask(wish, tools=[LOOKUP])
    jsonschema.validate(json.loads(said["lookup"]), LOOKUP["function"]["parameters"])
    assert end.reason == "tool_calls"


def test_without_strict_arguments_are_what_the_model_says(ask: Ask) -> None:
    function = LOOKUP["function"] | {"name": "free", "strict": "false"}
    tools = [LOOKUP, {"type": "function", "function": function}]
    call = "<|channel|>commentary to=functions.free<|message|>no JSON<|call|>"
    assert ask(call, tools=tools)[0] == {"free": "no JSON"}
    assert ask(call, tools=tools[1:])[0] == {"free": "no JSON"}
    said, end = ask(f"{FINAL}Any text.<|return|>", tools=tools)
    assert said == {"final": "Any text."} and end.reason == "stop"


def test_builtin_tools_stay_possible(
    ask: Ask, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model._questions, "_context", 4096)  # the tools are described at length
    options = {"response_format": DIGITS, "builtin_tools": ["python", "browser"]}
    call = "<|channel|>analysis to=python code<|message|>print(1)<|call|>"
    assert ask(call, **options)[0] == {"python": "print(1)"}
    call = "<|channel|>analysis to=browser.search code<|message|>{}<|call|>"
    assert ask(call, **options)[0] == {"browser.search": "{}"}


@pytest.mark.parametrize(
    ("begun", "wish"),
    [
        ("<|channel|>", "commentary"),
        ("<|channel|>analysis<|message|>", "Hm.<|return|>"),
        (f"{analysis('Hm.')}<|channel|>final <|constrain|>json<|message|>{{", "Ann"),
    ],
)
def test_an_answer_that_the_template_began(
    ask: Ask, model: Model, monkeypatch: pytest.MonkeyPatch, begun: str, wish: str
) -> None:
    options = {"response_format": of_schema(ANN), "template": "checkpoint"}
    monkeypatch.setattr(model._questions, "_template", f"<|start|>assistant{begun}")
    said, end = ask(wish, **options)
    jsonschema.validate(json.loads(("{" if begun.endswith("{") else "") + said["final"]), ANN)
    assert end.reason == "stop"
    monkeypatch.setattr(model._questions, "_template", f"<|start|>assistant{begun}<|call|>")
    with pytest.raises(InputError, match="expected a template that begins an answer which obeys"):
        ask(wish, **options)


@pytest.mark.parametrize(
    ("definition", "answer"),
    [
        ({"syntax": "regex", "definition": r"\d{2}/(a|é)"}, "33/é"),
        (
            {"syntax": "lark", "definition": 'start: "it is " NUMBER "<|end|>"\nNUMBER: /33|34/'},
            "it is 33<|end|>",
        ),
    ],
)
def test_grammars(ask: Ask, definition: dict[str, str], answer: str, tokenizer: Tokenizer) -> None:
    said, end = ask(FINAL, response_format={"type": "grammar", **definition})
    assert end.reason == "stop"
    assert len(said["final"]) == len(answer)


def test_generate_obeys_in_all_of_its_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Wish(model, "Ann<|return|>", "<|return|>", monkeypatch)
    tokens = list(model.generate([1, 2, 3], response_format=of_schema(ANN)))
    jsonschema.validate(json.loads(text_of(tokens)), ANN)


@pytest.mark.parametrize("seed", range(3))
def test_answers_of_a_batch_and_of_an_engine(talker: Path, seed: int) -> None:
    """The model knows nothing: all that is right comes from the grammar."""
    colours = {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3}
    schemas: list[dict[str, Any]] = [ANN, colours, {"const": "né\n"}, {"type": "boolean"}]
    options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "top_k": 500}
    told = load(talker).generate_batch(
        [[1, 2], [3]], response_format=of_schema(colours), max_tokens=200, **options
    )
    for tokens in told:
        jsonschema.validate(json.loads(text_of(tokens)), colours)
    with Engine(talker, sequences=3) as engine:
        requests = [
            engine.submit([7, 8, 9], response_format=of_schema(schema), **options)
            for schema in schemas
        ]
        free = engine.submit([7, 8, 9], max_tokens=5)
        for schema, request in zip(schemas, requests, strict=True):
            jsonschema.validate(json.loads(text_of(request)), schema)
        assert len(list(free)) == 5


def test_a_grammar_that_proves_too_large_ends_its_answer_alone(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"type": "grammar", "syntax": "regex", "definition": "(a|b)*a(a|b){30}"}
    with Engine(talker, sequences=3) as engine:
        other = engine.submit([1], response_format=of_schema(ANN))
        monkeypatch.setattr(grammar, "MOST_LEXER_STATES", 40)
        request = engine.submit([1, 2], response_format=large)
        with pytest.raises(OsscompileError, match="grammar: "):
            list(request)
        assert request.finish_reason == "error"
        jsonschema.validate(json.loads(text_of(other)), ANN)
    with pytest.raises(OsscompileError, match="grammar: "):
        list(load(talker).generate([1, 2], response_format=large))


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
        ({"response_format": of_schema({"type": 3})}, r"schema\.type"),
        ({"response_format": of_schema({"not": {}})}, "not"),
        ({"response_format": of_schema({"if": {}, "then": False})}, "if"),
        ({"response_format": of_schema({"uniqueItems": True})}, "uniqueItems"),
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


def test_the_model_is_told_that_json_is_wanted(tokenizer: Tokenizer) -> None:
    asked = tokenizer.decode(
        render_chat(QUESTION, tokenizer, response_format={"type": "json_object"})
    )
    assert '# Response Formats\n\n## json_object\n\n{"type":"object"}<|end|>' in asked
    asked = tokenizer.decode(render_chat(QUESTION, tokenizer, response_format=DIGITS))
    assert "# Response Formats" not in asked
