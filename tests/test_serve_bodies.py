"""Bodies that a server refuses: each with the right status, the field that is wrong, and little
work."""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError
from serving import CHAT, HELLO, PATIENCE, ScriptedEngine, ask, serving_script

from osscompile.runtime import InputError
from osscompile.runtime.harmony.structured import read_response_format
from osscompile.runtime.harmony.tools import read_tools
from osscompile.runtime.serve.bodies import MAX_TOOLS, Body
from osscompile.runtime.serve.chat_body import ChatBody
from osscompile.runtime.serve.completion_body import CompletionBody
from osscompile.runtime.serve.read_json import MAX_DEPTH, MAX_KEYS, MAX_PATTERN
from osscompile.runtime.serve.response_body import ResponseBody

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
PROMPT = {"model": "scripted", "prompt": "Hello"}
INPUT = {"model": "scripted", "input": "Hello"}
HUGE = 10**400  # beyond float64


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_script(ScriptedEngine(), max_body_bytes=100_000) as url:
        yield url


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def with_schema(schema: object) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return HELLO | {"tools": [tool]}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b""),
        (400, b"{"),
        (400, b"[]"),
        (400, b"\xff\xfe"),
        (400, b'"text"'),
        (400, b"[" * 50_000),
        (400, {"model": "scripted"}),
        (400, {"messages": HELLO["messages"]}),
        (400, HELLO | {"messages": []}),
        (400, HELLO | {"messages": "Hello"}),
        (400, HELLO | {"messages": [{"role": "user", "content": "refuse"}]}),
        (400, HELLO | {"stream": "yes"}),
        (400, HELLO | {"seed": 1 << 70}),
        (400, HELLO | {"n": 1000}),
        (400, HELLO | {"messages": HELLO["messages"] * 1400, "temperature": "hot"}),
        (400, b'{"model": "scripted", "messages": [{}], "temperature": NaN}'),
        (400, with_schema(nested(MAX_DEPTH))),
        (400, with_schema({"type": "string", "pattern": "a?" * MAX_PATTERN})),
        (400, b'{"model": "scripted", "messages": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
        (404, HELLO | {"model": "\ud800"}),
        (413, b'"' + b"x" * 100_000 + b'"'),
    ],
)
def test_bad_bodies(url: str, status: int, body: object) -> None:
    found, answer, _ = ask(url, body=body)
    assert found == status, answer
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500


def test_a_schema_may_be_as_deep_as_people_write_them(url: str) -> None:
    assert ask(url, body=with_schema(nested(20)))[0] == 200


def test_a_body_that_does_not_say_its_size_is_cut(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    chunks = (b"x" * 20_000 for _ in range(50))
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    try:
        connection.request("POST", CHAT, chunks, headers, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it answered before all had been sent
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, HELLO | {"modalities": ["x"] * 50_000}),
        (ChatBody, HELLO | {"messages": [5] * 50_000}),
        (ChatBody, HELLO | {"tools": [5] * 50_000}),
        (ChatBody, HELLO | {"stop": [5] * 50_000}),
        (CompletionBody, PROMPT | {"prompt": [[]] * 50_000}),
        (CompletionBody, PROMPT | {"prompt": [[[]] * 50_000]}),
        (CompletionBody, PROMPT | {"prompt": [1] * 50_000 + [""]}),
        (ResponseBody, INPUT | {"input": [5] * 50_000}),
        (ResponseBody, INPUT | {"tools": [{}] * 50_000}),
        (ResponseBody, INPUT | {"include": [5] * 50_000}),
    ],
)
def test_a_wrong_list_costs_no_error_for_each_of_its_elements(
    kind: type[Body], body: object
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody, ResponseBody])
def test_every_list_of_a_body_has_a_limit(kind: type[Body]) -> None:
    def lists(schema: Any) -> Iterator[Any]:
        if isinstance(schema, dict):
            if schema.get("type") == "array":
                yield schema
            for name, value in schema.items():
                # within messages the engine checks, which stops at the first error
                yield from () if name == "messages" else lists(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from lists(value)

    found = [*lists(kind.model_json_schema())]
    assert found and all("maxItems" in each for each in found)


def test_an_object_of_many_keys_is_refused_before_each_is_checked(url: str) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, PROMPT), (RESPONSES, INPUT)):
        for wrong in (
            {str(i): 1 for i in range(MAX_KEYS)},
            {"logit_bias": {str(i): "" for i in range(MAX_KEYS + 1)}},
        ):
            status, answer, _ = ask(url, path, body | wrong)
            assert status == 400 and f"{MAX_KEYS} keys" in answer["error"]["message"]


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000])
def test_numbers_that_are_none_or_beyond_float64(url: str, number: bytes) -> None:
    """Whoever reads an answer that has one would fail."""
    for path, body in ((CHAT, HELLO), (RESPONSES, INPUT)):
        for field in (b"metadata", b"user", b"safety_identifier", b"prompt_cache_key"):
            text = json.dumps(body).encode()[:-1] + b', "%s": {"a": [%s]}}' % (field, number)
            status, answer, _ = ask(url, path, text)
            assert status == 400 and "float64" in answer["error"]["message"]


def test_whole_numbers_beyond_float64_in_schemas() -> None:
    """The prompt tells numbers as float64, also where no server has read them."""
    properties = {"n": {"type": "integer", "default": HUGE}}
    parameters = {"type": "object", "properties": properties}
    with pytest.raises(InputError, match=r"tools\[0\]\.function\.parameters: .* too large"):
        read_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    shape = {"name": "n", "schema": {"type": "number", "maximum": HUGE}}
    with pytest.raises(InputError, match=r"response_format\.json_schema\.schema: .* too large"):
        read_response_format({"type": "json_schema", "json_schema": shape})


def test_names_of_tools_are_not_compared_with_each_other() -> None:
    compared = 0

    class Name(str):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str(self) == other

        __hash__ = str.__hash__

    names = [Name(i) for i in range(1000)]
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    assert len(read_tools(tools)) == 1000 and compared < 10_000
    with pytest.raises(InputError, match=r"tools\[1000\]\.function\.name: .* '7' twice"):
        read_tools([*tools, tools[7]])


def test_as_many_tools_as_openai_takes(url: str) -> None:
    def tools(count: int) -> list[dict[str, object]]:
        return [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]

    assert ask(url, body=HELLO | {"tools": tools(MAX_TOOLS)})[0] == 200
    status, answer, _ = ask(url, body=HELLO | {"tools": tools(MAX_TOOLS + 1)})
    assert (status, answer["error"]["param"]) == (400, "tools")


LONG = "a?" * MAX_PATTERN


@pytest.mark.parametrize(
    "shape",
    [
        {"type": "grammar", "syntax": "regex", "definition": LONG},
        {"type": "grammar", "syntax": "lark", "definition": f'start: "a" /b/ | /{LONG}/i'},
        {"type": "json_schema", "json_schema": {"schema": {"patternProperties": {LONG: {}}}}},
        {"type": "json_schema", "json_schema": {"schema": {"items": [{"pattern": LONG}]}}},
    ],
    ids=["regex", "lark", "patternProperties", "pattern"],
)
def test_regular_expressions_are_bounded_wherever_they_stand(url: str, shape: object) -> None:
    status, answer, _ = ask(url, body=HELLO | {"response_format": shape})
    assert status == 400 and "patterns of at most" in answer["error"]["message"]


def test_what_may_be_long_beside_regular_expressions(url: str) -> None:
    lark = f'start: "{LONG}" // {LONG}\n | /a/'
    shape = {"type": "grammar", "syntax": "lark", "definition": lark}
    assert ask(url, body=HELLO | {"response_format": shape})[0] == 200
    assert ask(url, body=with_schema({"description": LONG}))[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, PROMPT | {"prompt": ""}, "prompt"),
        (COMPLETIONS, PROMPT | {"prompt": 5}, "prompt"),
        (COMPLETIONS, PROMPT | {"prompt": []}, "prompt"),
        (COMPLETIONS, PROMPT | {"prompt": [[]]}, "prompt[0]"),
        (COMPLETIONS, PROMPT | {"prompt": ["a", 5]}, "prompt[1]"),
        (CHAT, HELLO | {"stop": [5]}, "stop[0]"),
        (CHAT, HELLO | {"tool_choice": 5}, "tool_choice"),
        (CHAT, HELLO | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, HELLO | {"w" * 90_000: 1}, "w" * 100),
        (RESPONSES, INPUT | {"input": [5]}, "input[0]"),
        (RESPONSES, INPUT | {"tools": [{"type": "function"}]}, "tools[0].name"),
        (RESPONSES, INPUT | {"input": [{"role": "user", "phase": []}]}, "input[0].phase"),
    ],
)
def test_errors_name_the_field_that_was_sent(url: str, path: str, body: object, param: str) -> None:
    status, answer, _ = ask(url, path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert answer["error"]["message"].startswith(f"{param}: ") and "list[" not in str(answer)


def test_bodies_that_are_no_text(url: str) -> None:
    status, answer, _ = ask(url, body=b'{"model": "\xe9"}')
    assert status == 400 and "UTF-8" in answer["error"]["message"]
    packed = gzip.compress(json.dumps(HELLO).encode())
    status, answer, _ = ask(url, body=packed, Content_Encoding="gzip")
    assert status == 415 and "gzip" in answer["error"]["message"]
