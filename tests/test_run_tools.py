"""The loop that runs the calls of a model, which is made up here: it says what each test gives."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from talker import TOKENIZER, say_each
from test_chat import DATE, answer_ids, user

from osscompile.runtime import (
    Arguments,
    Call,
    Engine,
    Finish,
    InputError,
    Model,
    Piece,
    Reasoning,
    Text,
    ToolCall,
    ToolLoop,
    ToolResult,
    as_messages,
    calls_of,
    load,
)
from osscompile.runtime.tokenizer import Tokenizer

TOKENS = Tokenizer(TOKENIZER)
Script = Callable[..., list[list[int]]]


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


async def later(text: str) -> str:
    return text


def fail(text: str) -> str:
    """Fails."""
    raise LookupError(f"no {text} here")


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker)


@pytest.fixture
def script(model: Model, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Let the model say one of these answers after the other; their prompts."""

    def script(*answers: list[tuple[str, str, str]], context: int = 100_000) -> list[list[int]]:
        monkeypatch.setattr(model, "context", context)
        monkeypatch.setattr(model._questions, "_context", context)
        ids = [answer_ids(TOKENS, *answer) for answer in answers]
        return say_each(model, ids, monkeypatch)

    return script


def call(
    arguments: str, name: str = "functions.add", end: str = "<|call|>"
) -> tuple[str, str, str]:
    channel = "commentary" if name.startswith("functions.") else "analysis"
    return f"{channel} to={name}", arguments, end


def final(text: str) -> list[tuple[str, str, str]]:
    return [("final", text, "<|return|>")]


def results(pieces: Iterable[Piece]) -> list[tuple[str, bool]]:
    return [(p.text, p.is_error) for p in pieces if isinstance(p, ToolResult)]


def run(model: Model, *tools: Callable[..., object], **options: Any) -> ToolLoop:
    return model.run_tools([user("2 + 3 + 4?")], tools, current_date=DATE, **options)


def test_loop_of_two_calls_streams_all_and_keeps_its_reasoning(
    model: Model, script: Script
) -> None:
    prompts = script(
        [("analysis", "First.", "<|end|>"), call('{"a": 2, "b": 3}')],
        [("analysis", "Then.", "<|end|>"), call('{"a": 5, "b": 4}')],
        final("9"),
    )
    loop = run(model, add)
    pieces = list(loop)
    assert [call.text for call in calls_of(pieces)] == ['{"a": 2, "b": 3}', '{"a": 5, "b": 4}']
    assert [type(p) for p in pieces if not isinstance(p, Reasoning | Text | Arguments)] == [
        *(ToolCall, Finish, ToolResult) * 2,
        Finish,
    ]
    assert [p for p in pieces if isinstance(p, ToolResult)] == [
        ToolResult("commentary", "5", "call_0", "add"),
        ToolResult("commentary", "9", "call_1", "add"),
    ]
    assert pieces[-1] == Finish("stop")
    texts = [TOKENS.decode(prompt) for prompt in prompts]
    assert texts[2].startswith(texts[1].removesuffix("<|start|>assistant"))
    assert texts[2].endswith(
        "<|start|>assistant<|channel|>analysis<|message|>First.<|end|>"
        "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>"
        '{"a": 2, "b": 3}<|call|>'
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>5<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Then.<|end|>"
        "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>"
        '{"a": 5, "b": 4}<|call|>'
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>9<|end|>"
        "<|start|>assistant"
    )
    assert loop.messages == [user("2 + 3 + 4?"), *as_messages(pieces)]
    assert loop.messages[-1]["content"] == "9"
    script(final("Bye"))
    list(model.chat([*loop.messages, user("Bye")], tools=[add]))


def test_function_called_python_gets_a_string_however_it_is_called(
    model: Model, script: Script
) -> None:
    """Models are trained to send code to python, not JSON, and with no `functions.` before it."""
    seen = []

    def python(code: str) -> str:
        """Runs code."""
        seen.append(code)
        return "4"

    prompts = script(
        [call('{"code": "print(2 + 2)"}', "functions.python")],
        [call("print(1 + 3)", "python")],
        final("4"),
    )
    pieces = list(run(model, python))
    assert seen == ["print(2 + 2)", "print(1 + 3)"]
    assert results(pieces) == [("4", False)] * 2
    prompt = TOKENS.decode(prompts[0])
    assert "type python = (_: {" in prompt and "Jupyter" not in prompt
    assert TOKENS.decode(prompts[2]).count("<|start|>functions.python to=assistant") == 2


def test_function_called_browser(model: Model, script: Script) -> None:
    def browser(url: str) -> str:
        return f"page {url}"

    script(
        [call('{"url": "a"}', "functions.browser")], [call('{"url": "b"}', "browser")], final("")
    )
    assert results(run(model, browser)) == [("page a", False), ("page b", False)]


def test_parameters_of_anyof_and_without_a_type(model: Model, script: Script) -> None:
    seen = []

    def find(where: str | None, what, limit: int | None = None) -> list[str]:  # type: ignore[no-untyped-def]
        seen.append((where, what, limit))
        return []

    script(
        [call('{"where": null, "what": {"deep": [1]}}', "functions.find")],
        [call('{"where": "here", "what": "x", "limit": 2}', "functions.find")],
        [call('{"where": 5, "what": "x"}', "functions.find")],
        final("none"),
    )
    told = results(run(model, find))
    assert seen == [(None, {"deep": [1]}, None), ("here", "x", 2)]
    assert told == [
        ("[]", False),
        ("[]", False),
        ("Error: arguments.where: expected text or null, found 5", True),
    ]
    # The same in OpenAI's form, which the model is told of in harmony's own words.
    parameters = {
        "type": "object",
        "properties": {"where": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "what": {}},
    }
    prompts = script(final(""))
    tool = {"type": "function", "function": {"name": "find", "parameters": parameters}}
    list(model.chat([user("?")], tools=[tool]))
    assert "type find = (_: {\nwhere?: any,\nwhat?: any,\n}) => any;" in TOKENS.decode(prompts[0])


def test_call_that_does_not_stop_is_answered_all_the_same(model: Model, script: Script) -> None:
    """What it says after it, made up without the result, is neither told nor kept."""
    prompts = script(
        [call('{"a": 2, "b": 3}', end="<|end|>"), ("final", "It is 77.", "<|return|>")],
        final("5"),
    )
    loop = run(model, add)
    pieces = list(loop)
    assert results(pieces) == [("5", False)]
    assert "".join(piece.text for piece in pieces if isinstance(piece, Text)) == "5"
    assert "77" not in TOKENS.decode(prompts[1]) and "77" not in json.dumps(loop.messages)


def test_call_ends_an_answer_whatever_the_checkpoint_says(
    model: Model, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`<|call|>` is missing in gpt-oss's own list of ends."""
    script([call('{"a": 2, "b": 3}'), ("final", "It is 77.", "<|return|>")])
    monkeypatch.setattr(model._questions, "_stops", frozenset({TOKENS.special["<|return|>"]}))
    pieces = list(model.chat([user("?")], tools=[add]))
    assert pieces[-1] == Finish("tool_calls") and not any(piece.text for piece in pieces)


@pytest.mark.parametrize(
    "text", ['{"a": 2, "b": }', "[1, 2]", "a=2", '{"a": NaN, "b": 1}', "[" * 9999]
)
def test_arguments_that_are_not_json_are_given_as_they_are_and_marked(
    model: Model, script: Script, text: str
) -> None:
    script([call(text)], final(""))
    pieces = list(run(model, add))
    (made,) = calls_of(pieces)
    assert made == Call("call_0", "add", text) and made.arguments is None
    ((told, is_error),) = results(pieces)
    assert told.startswith("Error: arguments: expected a JSON object, found") and is_error
    assert Call("call_0", "add", '{"a": 1}').arguments == {"a": 1}


def test_tool_that_the_model_made_up(model: Model, script: Script) -> None:
    prompts = script([call('{"a": 2}', "functions.subtract")], [call("1 + 1", "python")], final(""))
    assert results(run(model, add, fail)) == [
        ("Error: there is no tool subtract; the tools are: add, fail", True),
        ("Error: there is no tool python; the tools are: add, fail", True),
    ]
    assert "<|start|>functions.subtract to=assistant<|channel|>commentary" in TOKENS.decode(
        prompts[1]
    )


def test_two_calls_in_one_turn(model: Model, script: Script) -> None:
    prompts = script(
        [call('{"a": 2, "b": 3}', end="<|end|>"), call('{"a": 5, "b": 4}')],
        [call('{"a": 1, "b": 1}')],
        final("9"),
    )
    pieces = list(run(model, add))
    assert [(p.id, p.text) for p in pieces if isinstance(p, ToolResult)] == [
        ("call_0", "5"),
        ("call_1", "9"),
        ("call_2", "2"),
    ]
    told = "<|start|>functions.add to=assistant<|channel|>commentary<|message|>"
    assert f"{told}5<|end|>{told}9<|end|><|start|>assistant" in TOKENS.decode(prompts[1])


@pytest.mark.parametrize("is_single", [True, False])
def test_result_of_100_kb_is_told_whole(model: Model, script: Script, is_single: bool) -> None:
    text = "x" * 100_000 if is_single else "It is 20 degrees. " * 5_600

    def fetch() -> str:
        return text

    prompts = script([call("{}", "functions.fetch")], final(""), context=400_000)
    assert results(run(model, fetch)) == [(text, False)]
    assert text in TOKENS.decode(prompts[1])


def test_result_that_the_context_cannot_hold_is_cut_with_a_note(
    model: Model, script: Script
) -> None:
    def fetch() -> str:
        return "\u65e5\u672c " * 50_000

    prompts = script([call("{}", "functions.fetch")], final("done"), context=2_000)
    pieces = list(run(model, fetch))
    ((told, _),) = results(pieces)
    shown, note = told.split("\n")
    assert fetch().startswith(shown)
    assert note == f"[cut: the context has room for {len(shown)} of 150000 characters]"
    assert len(prompts[1]) < 2_000 and pieces[-1] == Finish("stop")
    used = len(prompts[0]) + 20
    assert (2_000 - used) / 2 - 60 < len(TOKENS.encode(shown)) <= (2_000 - used) / 2 + 20


def test_calls_are_not_run_without_room_for_their_results(model: Model, script: Script) -> None:
    prompts = script([call('{"a": 2, "b": 3}')])
    list(model.chat([user("2 + 3 + 4?")], tools=[add], current_date=DATE))
    script([call('{"a": 2, "b": 3}')], context=len(prompts[0]) + 60)
    pieces = list(run(model, add))
    assert results(pieces) == [] and pieces[-1] == Finish("length")


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        (fail, '{"text": "tea"}', "Error: LookupError: no tea here"),
        (add, '{"a": 2}', "Error: arguments: expected a value of b, found none"),
        (add, '{"a": 2, "b": "3"}', 'Error: arguments.b: expected a whole number, found "3"'),
    ],
)
def test_errors_are_told_to_the_model_which_goes_on(
    model: Model, script: Script, tool: Callable[..., object], arguments: str, told: str
) -> None:
    prompts = script([call(arguments, f"functions.{tool.__name__}")], final("Sorry."))
    pieces = list(run(model, tool))
    assert results(pieces) == [(told, True)]
    assert f"<|message|>{told}<|end|><|start|>assistant" in TOKENS.decode(prompts[1])
    assert pieces[-1] == Finish("stop")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (SystemExit(4), "Error: SystemExit: 4"),
        (asyncio.CancelledError("late"), "Error: CancelledError: late"),
        (GeneratorExit(), "Error: GeneratorExit: "),
    ],
)
def test_whatever_a_tool_raises_does_not_end_the_loop(
    model: Model, script: Script, raised: BaseException, told: str
) -> None:
    def leave() -> None:
        raise raised

    script([call("{}", "functions.leave")], [call("1", "python")], final("Sorry."))
    pieces = list(run(model, leave, python=lambda code: leave()))
    assert results(pieces) == [(told, True)] * 2 and pieces[-1] == Finish("stop")


def test_what_is_yet_to_give_a_result_is_an_error(model: Model, script: Script) -> None:
    made: list[Any] = []

    def wait() -> object:
        made.append(later("tea"))
        return made[-1]

    def count() -> object:
        return [map(str, [1, 2])]

    script([call("{}", "functions.wait")], [call("{}", "functions.count")], final(""))
    told = results(run(model, wait, count))
    assert told == [
        ("Error: expected a result, found a coroutine, which is yet to give one", True),
        ("Error: expected a result, found a map, which is yet to give one", True),
    ]
    assert inspect.getcoroutinestate(made[0]) == inspect.CORO_CLOSED


@pytest.mark.parametrize(("value", "told"), [(5, "5"), (None, "null"), ({"a": [1]}, '{"a": [1]}')])
def test_result_of_an_executor_is_made_text(
    model: Model, script: Script, value: object, told: str
) -> None:
    script([call("2 + 3", "python")], final("5"))
    assert results(run(model, python=lambda code: value)) == [(told, False)]


def test_surrogates_in_a_result_are_replaced(model: Model, script: Script) -> None:
    def read() -> str:
        return "a\udce9b"

    script([call("", "functions.read")], final(""))
    assert results(run(model, read)) == [("a?b", False)]


def test_rounds_are_limited_and_the_last_calls_are_not_run(model: Model, script: Script) -> None:
    script(*[[call('{"a": 2, "b": 3}')]] * 3)
    pieces = list(run(model, add, max_rounds=3))
    assert len(results(pieces)) == 2 and len(calls_of(pieces)) == 3
    assert pieces[-1] == Finish("max_rounds")


def test_call_that_is_cut_off_is_not_run(model: Model, script: Script) -> None:
    script([call('{"a": 2, "b": 3}')])
    pieces = list(run(model, add, max_tokens=len(answer_ids(TOKENS, call('{"a": 2, "b": 3}'))) - 2))
    assert results(pieces) == [] and pieces[-1] == Finish("length")


def test_forced_choice_is_for_the_first_answer(
    model: Model, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    script()
    special, encode = TOKENS.special, TOKENS.encode
    forced = [special["<|channel|>"], *encode("commentary to=functions.add ")]
    forced += [special["<|constrain|>"], *encode("json"), special["<|message|>"]]
    forced += [*encode('{"a": 2, "b": 3}'), special["<|call|>"]]
    say_each(model, [forced, answer_ids(TOKENS, *final("5"))], monkeypatch)
    pieces = list(run(model, add, tool_choice="required"))
    assert results(pieces) == [("5", False)] and pieces[-1] == Finish("stop")


def test_loop_that_is_left_early_runs_nothing_more(model: Model, script: Script) -> None:
    def explode() -> None:
        raise AssertionError("it ran")

    script([("analysis", "H", "<|end|>"), call("{}", "functions.explode")])
    loop = run(model, explode)
    first = next(loop)
    loop.close()
    assert first == Reasoning("analysis", "H") and list(loop) == []
    assert loop.messages[1:] == as_messages([first])


def test_interrupt_in_a_function_ends_the_loop(model: Model, script: Script) -> None:
    def wait() -> None:
        raise KeyboardInterrupt

    script([call("{}", "functions.wait")])
    with pytest.raises(KeyboardInterrupt):
        list(run(model, wait))


def test_python_runs_with_an_executor_alone(model: Model, script: Script) -> None:
    seen = []

    def execute(code: str) -> str:
        seen.append(code)
        if "fail" in code:
            raise OSError("the machine is gone")
        return "4\n"

    prompts = script([call("print(2 + 2)", "python")], [call("fail", "python")], final("4"))
    pieces = list(run(model, add, python=execute))
    assert seen == ["print(2 + 2)", "fail"]
    assert results(pieces) == [("4\n", False), ("Error: OSError: the machine is gone", True)]
    assert "time out after 120.0 seconds. The drive at '/mnt/data'" in TOKENS.decode(prompts[0])
    assert (
        "<|start|>assistant to=python<|channel|>analysis code<|message|>print(2 + 2)<|call|>"
        "<|start|>python to=assistant<|channel|>analysis<|message|>4\n<|end|>"
    ) in TOKENS.decode(prompts[1])


def test_executor_describes_itself(model: Model, script: Script) -> None:
    class Executor:
        description = "Runs code on the moon."

        def __call__(self, code: str) -> str:
            return ""

    prompts = script(final(""))
    list(run(model, python=Executor()))
    assert "# Tools\n\n## python\n\nRuns code on the moon.\n\n# Valid" in TOKENS.decode(prompts[0])


class Later:
    __name__ = "later"

    async def __call__(self, text: str) -> str:
        return text


def count_up(text: str) -> Iterator[str]:
    yield text


@pytest.mark.parametrize(
    ("tools", "options", "message"),
    [
        ("add", {}, "tools: expected a list of functions"),
        ([{"type": "function", "function": {"name": "f"}}], {}, "expected a function to run"),
        ([add, add], {}, "found 'add' twice"),
        ([later], {}, "found a coroutine"),
        ([functools.lru_cache(later)], {}, "found a coroutine"),
        ([functools.partial(later, "x")], {}, "found a coroutine"),
        ([Later()], {}, "found a coroutine"),
        ([count_up], {}, "found a generator"),
        ([lambda x: x], {}, "expected a function with a name"),
        ([add], {"max_rounds": 0}, "max_rounds: expected a whole number from 1"),
        ([add], {"builtin_tools": ["browser"]}, "builtin_tools: expected what runs them"),
        ([add], {"python": "exec"}, "python: expected a function of code"),
        ([add], {"tool_choice": "any"}, "tool_choice: expected auto"),
        ([], {"temperature": -1}, "temperature"),
    ],
)
def test_bad_arguments_raise_before_anything_is_computed(
    model: Model, monkeypatch: pytest.MonkeyPatch, tools: Any, options: Any, message: str
) -> None:
    monkeypatch.setattr(model._runner.device, "run", None)
    with pytest.raises(InputError, match=message):
        model.run_tools([user("?")], tools, **options)


def test_function_called_like_the_builtin_python_beside_it(model: Model) -> None:
    def python(code: str) -> str:
        return code

    with pytest.raises(InputError, match="other names than the builtin tools'"):
        run(model, python, python=lambda code: code)


# With nano, which was trained to call


def multiply(a: int, b: int) -> dict[str, int]:
    """Multiplies."""
    return {"result": a * b}


def test_nano_calls_a_function_and_words_its_result(nano_artifact: Path) -> None:
    question = [user("What is 12 times 11?")]
    options: dict[str, Any] = {"current_date": DATE, "reasoning": "low"}
    pieces = list(load(nano_artifact).run_tools(question, [multiply], **options))
    assert results(pieces) == [('{"result": 132}', False)]
    assert "".join(p.text for p in pieces if p.channel == "final") == "The result is 132."
    with Engine(nano_artifact, context=2048) as engine:
        assert list(engine.run_tools(question, [multiply], **options)) == pieces


@pytest.mark.parametrize("reasoning", ["low", "medium", "high"])
def test_nano_runs_a_loop_of_two_calls(nano_artifact: Path, reasoning: str) -> None:
    question = [user("What is 12 times 11 and 7 times 8?")]
    loop = load(nano_artifact).run_tools(
        question, [multiply], current_date=DATE, reasoning=reasoning
    )
    pieces = list(loop)
    assert [call.arguments for call in calls_of(pieces)] == [{"a": 12, "b": 11}, {"a": 7, "b": 8}]
    assert loop.messages[-1]["content"] == "The result is 132. The result is 56."
