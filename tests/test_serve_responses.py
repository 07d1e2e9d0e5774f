"""The server's responses, as OpenAI's own client and its agents see them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ScriptedEngine, serving, serving_script

from osscompile.runtime import Engine, InputError
from osscompile.runtime.serve.app import make_app
from osscompile.runtime.serve.errors import ApiError
from osscompile.runtime.serve.response_store import ResponseStore
from osscompile.runtime.serve.service import make_service

openai = pytest.importorskip("openai")

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Gets the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALLS = (
    "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a":1}<|call|>'
)


@pytest.fixture(scope="module")
def url(nano_artifact: Path) -> Iterator[str]:
    with (
        Engine(nano_artifact) as engine,
        serving(make_app(make_service(engine, "nano", 100))) as url,
    ):
        yield url


@pytest.fixture
def client(url: str) -> Any:
    return client_of(url)


def client_of(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: Any, input: Any = "What is 17 + 25?", **options: Any) -> Any:
    options = {"model": "nano", "temperature": 0, "input": input} | options
    return client.responses.create(**options)


def test_a_response_has_reasoning_text_and_usage(client: Any) -> None:
    response = ask(client)
    reasoning, message = response.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert reasoning.content[0].text
    assert response.output_text == "17 + 25 = 42."
    assert (response.status, message.phase) == ("completed", "final_answer")
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


def test_events_come_in_their_order(client: Any) -> None:
    events = list(ask(client, stream=True))
    types = [event.type for event in events]
    without_repeats = [t for t, before in zip(types, ["", *types], strict=False) if t != before]
    text = ["content_part.added", "TEXT.delta", "TEXT.done", "content_part.done"]
    item = ["output_item.added", *text, "output_item.done"]
    expected = ["created", "in_progress"]
    expected += [name.replace("TEXT", "reasoning_text") for name in item]
    expected += [name.replace("TEXT", "output_text") for name in item]
    assert without_repeats == [f"response.{name}" for name in [*expected, "completed"]]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == events[-1].response.output_text == "17 + 25 = 42."


def test_the_stream_of_the_client_adds_up(client: Any) -> None:
    with client.responses.stream(model="nano", input="What is 17 + 25?", temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "17 + 25 = 42."


def test_a_response_goes_on_with_an_earlier_one(client: Any) -> None:
    told = "Anna lives in Paris. Ben lives in Rome."
    first = ask(client, told, instructions="Be brief.")
    second = ask(client, "What is 2 + 2?", previous_response_id=first.id)
    assert second.previous_response_id == first.id and second.output_text == "2 + 2 = 4."
    alone = ask(client, "What is 2 + 2?")
    assert second.usage.input_tokens > alone.usage.input_tokens + len(told.split())
    forgotten = ask(client, "What is 2 + 2?", store=False)
    for id in ("resp_0", forgotten.id):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, previous_response_id=id)
        assert caught.value.code == "previous_response_not_found"


def test_a_call_and_its_result(client: Any) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = ask(client, question, tools=[WEATHER])
    (call,) = (item for item in first.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"temp":7,"sky":"sunny"}',
    }
    goes_on = ask(client, [result], previous_response_id=first.id, tools=[WEATHER])
    sent_back = [*question, *(item.model_dump() for item in first.output), result]
    again = ask(client, sent_back, tools=[WEATHER])
    for response in (goes_on, again):
        assert response.output_text == "It is 7 degrees and sunny in Paris."
    assert goes_on.usage.input_tokens == again.usage.input_tokens


def test_what_is_cut_is_incomplete(client: Any) -> None:
    *_, last = ask(client, max_output_tokens=8, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.output[-1].status == "incomplete"


def test_logprobs_where_they_are_asked_for(client: Any) -> None:
    response = ask(client, top_logprobs=1, include=["message.output_text.logprobs"])
    (part,) = response.output[-1].content
    assert b"".join(bytes(t.bytes) for t in part.logprobs).decode() == part.text
    assert ask(client).output[-1].content[0].logprobs == []


def test_wrong_requests_name_the_field(client: Any) -> None:
    image = {"type": "input_image", "image_url": "data:,"}
    for match, options in {
        r"input\[0\].content\[0\]": {"input": [{"role": "user", "content": [image]}]},
        r"input\[0\].type": {"input": [{"type": "computer_call"}]},
        r"input\[0\].phase": {"input": [{"role": "assistant", "content": "", "phase": "x"}]},
        r"tools\[0\].type": {"tools": [{"type": "web_search"}]},
        "background": {"background": True},
        "truncation": {"truncation": "auto"},
        r"input\[0\].call_id": {
            "input": [{"type": "function_call_output", "call_id": "c", "output": ""}]
        },
    }.items():
        with pytest.raises(openai.BadRequestError, match=match):
            ask(client, **options)


def test_items_of_text_before_a_call() -> None:
    with serving_script(ScriptedEngine(CALLS)) as url:
        whole = ask(client_of(url), model="scripted")
        events = list(ask(client_of(url), model="scripted", stream=True))
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output[1].phase == "commentary"
    names = [e.type.removeprefix("response.") for e in events]
    assert names[-5:] == [
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ] or names[-4:] == [
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [e.output_index for e in events if e.type == "response.output_item.done"] == [0, 1, 2]


@pytest.mark.parametrize("instructions", ["Be brief.", None])
@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "function_call_output", "call_id": "c", "output": "1"}, "call_id"),
        ({"type": "function_call_output", "call_id": "c", "output": 5}, "output"),
        ({"type": "function_call", "call_id": 5, "name": "f", "arguments": "{}"}, "call_id"),
        ({"type": "function_call", "call_id": "c", "name": "f g", "arguments": "{}"}, "name"),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}, "arguments"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "nobody", "content": "x"}, "role"),
    ],
)
def test_errors_name_the_field_of_the_input(
    client: Any, item: dict[str, Any], param: str, instructions: str | None
) -> None:
    first = ask(client)
    empty = {"type": "reasoning", "summary": []}  # which is no message
    for before in (None, first.id):
        with pytest.raises(openai.BadRequestError) as caught:
            options = {"previous_response_id": before, "instructions": instructions}
            ask(client, input=[empty, {"role": "user", "content": "x"}, item], **options)
        assert caught.value.param == f"input[2].{param}"


def test_options_reach_the_engine_as_those_of_chat() -> None:
    engine = ScriptedEngine()
    schema = {"type": "object"}
    with serving_script(engine) as url:
        ask(
            client_of(url),
            model="scripted",
            instructions="Be brief.",
            tools=[WEATHER],
            tool_choice={"type": "function", "name": "get_weather"},
            parallel_tool_calls=False,
            text={"format": {"type": "json_schema", "name": "p", "schema": schema}},
            reasoning={"effort": "high", "summary": "auto"},
            max_output_tokens=5,
        )
    ((messages, options),) = engine.asked
    assert messages == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What is 17 + 25?"},
    ]
    function = {k: v for k, v in WEATHER.items() if k != "type"}
    assert options == {
        "temperature": 0,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "p", "schema": schema},
        },
        "reasoning": "high",
        "max_tokens": 5,
    }


def test_an_error_while_it_streams_is_a_failed_response() -> None:
    engine = ScriptedEngine()
    engine.error = RuntimeError("/home/somebody/secret.py failed")
    with serving_script(engine) as url:
        *_, last = ask(client_of(url), model="scripted", stream=True)
        with pytest.raises(openai.InternalServerError):
            ask(client_of(url), model="scripted")
    assert last.type == "response.failed" and "secret" not in last.response.error.message


def test_a_form_that_cannot_be_followed_to_the_end_is_the_clients_mistake() -> None:
    engine = ScriptedEngine()
    engine.error = InputError("response_format: grammar: expected one that llguidance can follow")
    with serving_script(engine) as url:
        *_, last = ask(client_of(url), model="scripted", stream=True)
        with pytest.raises(openai.BadRequestError, match="llguidance can follow"):
            ask(client_of(url), model="scripted")
    assert last.response.error.code == "invalid_prompt"
    assert "llguidance can follow" in last.response.error.message


def test_the_store_forgets_what_was_not_used_for_longest() -> None:
    store = ResponseStore(most=2)
    for name in "ab":
        store.put(name, [{"content": name}])
    store.get("a")
    store.put("c", [])
    assert store.get("a") == [{"content": "a"}] and store.get("c") == []
    with pytest.raises(ApiError):
        store.get("b")
    small = ResponseStore(most_bytes=100)
    small.put("a", [{"content": "a" * 60}])
    small.put("b", [{"content": "b" * 60}])
    assert small.get("b")
    with pytest.raises(ApiError):
        small.get("a")


# Agents


def test_an_agent_calls_a_function(url: str) -> None:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    asked: list[str] = []

    @agents.function_tool(strict_mode=False)
    def get_weather(city: str) -> str:
        """Gets the weather."""
        asked.append(city)
        return '{"temp":7,"sky":"sunny"}'

    models: list[Any] = [agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel]

    async def run(kind: Any, streams: bool) -> str:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        agent = agents.Agent(
            "weather",
            tools=[get_weather],
            model=kind(model="nano", openai_client=client),
            model_settings=agents.ModelSettings(temperature=0),
        )
        question = "What is the weather in Paris?"
        if not streams:
            return (await agents.Runner.run(agent, question)).final_output
        streamed = agents.Runner.run_streamed(agent, question)
        async for _ in streamed.stream_events():
            pass
        return streamed.final_output

    for kind in models:
        for streams in (False, True):
            assert asyncio.run(run(kind, streams)) == "It is 7 degrees and sunny in Paris."
    assert asked == ["Paris"] * 4
