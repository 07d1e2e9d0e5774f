"""Structured answers: what a model says that would rather say something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from talker import TOKENIZER
from walks import Walks, of_schema
from wishes import ANN, ANSWER, DIGITS, FINAL, LOOKUP, QUESTION, Ask, Wish, analysis, asker, text_of

from osscompile.runtime import Engine, InputError, Model, OsscompileError, grammar, load
from osscompile.runtime.harmony import render_chat
from osscompile.runtime.tokenizer import Tokenizer


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker)


@pytest.fixture
def ask(model: Model, monkeypatch: pytest.MonkeyPatch) -> Ask:
    return asker(model, monkeypatch)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


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


def test_a_grammar_that_takes_too_long_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit of llguidance's holds for how long an ambiguous one takes."""
    walks = Walks(TOKENIZER)
    ambiguous = {"type": "grammar", "syntax": "lark", "definition": 'start: e\ne: e e | "a"'}
    constraint, other = walks.constraint(ambiguous), walks.constraint(of_schema(ANN))
    monkeypatch.setattr(grammar, "SECONDS_OF_TOKEN", -grammar.SECONDS)
    constraint.push(walks.tokenizer.encode("a")[0])
    assert "more work than" in str(constraint.error) and other.error is None


def test_of_a_long_text_that_must_follow_little_is_encoded(tokenizer: Tokenizer) -> None:
    lengths, encode = list[int](), Tokenizer.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Tokenizer, "encode", lambda self, t: lengths.append(len(t)) or encode(self, t)
        )
        walks = Walks(TOKENIZER)
        text = "abcd" * 200
        grammar_of_text = {"type": "grammar", "syntax": "lark", "definition": f'start: "{text}"'}
        assert walks.accepts(walks.constraint(grammar_of_text), text)
    assert sorted(lengths)[-2] <= 256 < sorted(lengths)[-1] == len(text)  # the last was the test's


def test_the_model_is_told_that_json_is_wanted(tokenizer: Tokenizer) -> None:
    asked = tokenizer.decode(
        render_chat(QUESTION, tokenizer, response_format={"type": "json_object"})
    )
    assert '# Response Formats\n\n## json_object\n\n{"type":"object"}<|end|>' in asked
    asked = tokenizer.decode(render_chat(QUESTION, tokenizer, response_format=DIGITS))
    assert "# Response Formats" not in asked
