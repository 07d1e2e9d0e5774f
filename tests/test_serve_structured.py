"""Answers that obey a schema, as OpenAI's own client and its agents ask for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from serving import serving

from osscompile.runtime import Engine
from osscompile.runtime.serve.app import make_app
from osscompile.runtime.serve.service import make_service

pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

TOLD = "Anna is 7 years old, lives in Paris and likes red."
ASKED = [{"role": "developer", "content": "Extract the data."}, {"role": "user", "content": TOLD}]


class Person(BaseModel):
    name: str
    age: int
    city: str


ANNA = Person(name="Anna", age=7, city="Paris")


@pytest.fixture(scope="module")
def url(nano_artifact: Path) -> Iterator[str]:
    with (
        Engine(nano_artifact) as engine,
        serving(make_app(make_service(engine, "nano", 100))) as url,
    ):
        yield f"{url}/v1"


@pytest.fixture
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_models_of_pydantic(client: Any) -> None:
    options = {"model": "nano", "temperature": 0}
    chat = client.chat.completions.parse(messages=ASKED, response_format=Person, **options)
    assert chat.choices[0].message.parsed == ANNA
    assert client.responses.parse(input=ASKED, text_format=Person, **options).output_parsed == ANNA


def test_any_json(client: Any) -> None:
    form = {"type": "json_object"}
    answer = client.chat.completions.create(
        model="nano", messages=ASKED, response_format=form, temperature=0, max_tokens=200
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("schema", [{"type": "strange"}, {"type": "string", "pattern": "(?=x)"}])
def test_schemas_that_cannot_be_obeyed(client: Any, schema: dict[str, str]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="nano", messages=ASKED, response_format=form)
    assert caught.value.param.startswith("response_format")


def test_a_schema_beside_a_format_that_takes_none(client: Any) -> None:
    form = {"type": "json_object", "schema": Person.model_json_schema()}
    with pytest.raises(openai.BadRequestError, match="found 'schema'"):
        client.chat.completions.create(model="nano", messages=ASKED, response_format=form)
    with pytest.raises(openai.BadRequestError, match="found 'schema'"):
        client.responses.create(model="nano", input=TOLD, text={"format": form})


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", set()),
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
    ],
    ids=["none", "required", "by name"],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_choice_of_tools_holds(client: Any, choice: Any, names: set[str], streams: bool) -> None:
    """Whatever nano would rather say."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": city, "strict": True}}
        for name in ("get_weather", "get_time")
    ]
    options = {"tool_choice": choice, "parallel_tool_calls": False, "temperature": 0}
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = {"model": "nano", "messages": question, "tools": tools, "max_tokens": 300} | options
    if streams:
        with client.chat.completions.stream(**asked) as stream:
            answer = stream.get_final_completion().choices[0]
    else:
        answer = client.chat.completions.create(**asked).choices[0]
    calls = answer.message.tool_calls or []
    assert len(calls) == bool(names) and {call.function.name for call in calls} <= names
    assert answer.finish_reason == ("tool_calls" if names else "stop")
    for call in calls:
        assert list(json.loads(call.function.arguments)) == ["city"]


def test_an_agent_with_a_type_of_output(url: str) -> None:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)

    async def run() -> Any:
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        agent = agents.Agent(
            "extractor",
            instructions="Extract the data.",
            output_type=Person,
            model=agents.OpenAIResponsesModel("nano", client),
            model_settings=agents.ModelSettings(temperature=0),
        )
        return (await agents.Runner.run(agent, TOLD)).final_output

    assert asyncio.run(run()) == ANNA
