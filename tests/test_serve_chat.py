"""The server's chat and completions, as OpenAI's own client sees them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from serving import FINAL, ScriptedEngine, harmony_ids, serving, serving_script
from talker import TOKENIZER

from osscompile.runtime import Engine, InputError
from osscompile.runtime.serve.app import make_app
from osscompile.runtime.serve.service import make_service
from osscompile.runtime.tokenizer import Tokenizer

openai = pytest.importorskip("openai")

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Gets the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def engine(nano_artifact: Path) -> Iterator[Engine]:
    with Engine(nano_artifact) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Any]:
    with serving(make_app(make_service(engine, "nano", 100))) as url:
        yield client_of(url)


def client_of(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: Any, **options: Any) -> Any:
    options = {"messages": SUM, "model": "nano", "temperature": 0} | options
    return client.chat.completions.create(**options)


def test_an_answer_has_content_reasoning_and_usage(client: Any) -> None:
    answer = ask(client, reasoning_effort="medium")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "17 + 25 = 42.")
    assert choice.message.reasoning and choice.message.reasoning_content
    assert choice.finish_reason == "stop" and choice.logprobs is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert ask(client).usage.prompt_tokens_details.cached_tokens > 0
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "nano", "chatcmpl-")


def test_a_stream_adds_up_to_the_answer(client: Any) -> None:
    whole = ask(client).choices[0].message
    stream = ask(client, stream=True, stream_options={"include_usage": True})
    *chunks, end = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.content
    assert "".join(getattr(d, "reasoning", "") or "" for d in deltas) == whole.reasoning
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert end.choices == [] and end.usage.completion_tokens > 0
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({chunk.id for chunk in [*chunks, end]}) == 1


def test_choices_are_drawn_apart_and_again_with_a_seed(client: Any) -> None:
    options = {"n": 3, "seed": -5, "temperature": 2.0, "max_tokens": 40, "frequency_penalty": 2}
    first, second = (ask(client, **options).choices for _ in range(2))
    assert [c.index for c in first] == [0, 1, 2]
    assert [c.message for c in first] == [c.message for c in second]
    assert any(c.message != first[0].message for c in first)


def test_choices_share_their_prompt(client: Any) -> None:
    prompt = [{"role": "user", "content": "How is Anna? " * 90}]
    before = metric(client, "prompt"), metric(client, "cached")
    usage = ask(client, messages=prompt, n=4, max_tokens=4).usage
    read, cached = metric(client, "prompt") - before[0], metric(client, "cached") - before[1]
    assert read == 4 * usage.prompt_tokens  # which counts it once, as OpenAI does
    assert cached >= 3 * (usage.prompt_tokens - 1)


def metric(client: Any, name: str) -> float:
    text = urlopen(str(client.base_url).replace("/v1/", "/metrics")).read().decode()
    return float(re.search(rf"^osscompile_{name}_tokens_total (\S+)", text, re.M)[1])


def test_choices_of_a_stream_add_up(client: Any) -> None:
    said = ["", "", ""]
    ended = set()
    for chunk in ask(client, n=3, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            ended |= {choice.index} if choice.finish_reason else set()
    assert said == ["17 + 25 = 42."] * 3 and ended == {0, 1, 2}


def test_logprobs_are_those_of_the_content(client: Any) -> None:
    choice = ask(client, logprobs=True, top_logprobs=2).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == choice.message.content
    for token in tokens:
        assert token.logprob <= 0
        assert token.top_logprobs[0].token == token.token  # it was greedy
        assert sum(math.exp(t.logprob) for t in token.top_logprobs) <= 1 + 1e-6
    streamed = [
        token
        for chunk in ask(client, logprobs=True, top_logprobs=2, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [t.token for t in streamed] == [t.token for t in tokens]


def test_a_call_and_its_result(client: Any) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = ask(client, messages=question, tools=[WEATHER]).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    streamed = [
        c.choices[0].delta.tool_calls[0]
        for c in ask(client, messages=question, tools=[WEATHER], stream=True)
        if c.choices[0].delta.tool_calls
    ]
    assert streamed[0].id != call.id and streamed[0].function.name == "get_weather"
    arguments = "".join(part.function.arguments for part in streamed)
    assert arguments == call.function.arguments and {part.index for part in streamed} == {0}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temp":7,"sky":"sunny"}'}
    messages = [*question, answer.message.model_dump(), result]
    told = ask(client, messages=messages, tools=[WEATHER]).choices[0].message.content
    assert told == "It is 7 degrees and sunny in Paris."


def test_limits_and_stops_of_an_answer(client: Any) -> None:
    assert ask(client, max_completion_tokens=3).choices[0].finish_reason == "length"
    assert ask(client, max_completion_tokens=3, max_tokens=90).usage.completion_tokens == 3
    stopped = ask(client, stop=["42"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("17 + 25 = ", "stop")


def test_wrong_requests_name_the_field(client: Any) -> None:
    for param, options in {
        "messages[0].role": {"messages": [{"role": "nobody", "content": "?"}]},
        "temperature": {"temperature": 3},
        "reasoning_effort": {"reasoning_effort": "deep"},
        "n": {"n": 0},
        "wheels": {"extra_body": {"wheels": 4}},
        "logit_bias": {"logit_bias": {"99999999": 1}},
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **options)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.param == param, caught.value
    with pytest.raises(openai.BadRequestError, match="logprobs: true"):
        ask(client, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="at most 4096 tokens"):
        ask(client, messages=[{"role": "user", "content": "1 + 1? " * 4096}])
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, model="gpt-9")
    assert unknown.value.code == "model_not_found"


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "osscompile"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("openai/gpt-9")


# Completions


def test_completions_of_texts_and_of_ids(client: Any, engine: Engine) -> None:
    text = "What is 17"
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(text)
    options = {"model": "nano", "max_tokens": 6, "temperature": 0}
    by_text = client.completions.create(prompt=text, **options)
    by_ids = client.completions.create(prompt=ids, **options)
    several = client.completions.create(prompt=[text, "2 + 2"], **options)
    nested = client.completions.create(prompt=[ids, [5, 6]], n=2, **options)
    said = by_text.choices[0].text
    assert said and by_ids.choices[0].text == said == several.choices[0].text
    assert [c.text == said for c in nested.choices] == [True, True, False, False]
    assert [c.index for c in nested.choices] == [0, 1, 2, 3]
    assert by_text.usage.completion_tokens <= 6
    echoed = client.completions.create(prompt=text, echo=True, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in echoed) == text + said


def test_logprobs_of_completions(client: Any) -> None:
    options = {"model": "nano", "prompt": "What is 17", "max_tokens": 6, "temperature": 0}
    choice = client.completions.create(logprobs=2, **options).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens).startswith(choice.text)
    assert told.text_offset[0] == 0 and sorted(told.text_offset) == told.text_offset
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(logprobs=2, echo=True, **options)


@pytest.mark.parametrize("streams", [False, True])
def test_what_ends_a_completion_is_none_of_its_text(client: Any, streams: bool) -> None:
    prompt = "<|start|>assistant<|channel|>final<|message|>17 + 25"
    options = {"model": "nano", "max_tokens": 40, "temperature": 0, "logprobs": 1}
    told = client.completions.create(prompt=ids_of(prompt), stream=streams, **options)
    choices = [chunk.choices[0] for chunk in told] if streams else told.choices
    assert choices[-1].finish_reason == "stop"
    text = "".join(choice.text for choice in choices)
    assert text.endswith(".") and "<|" not in text
    assert text == "".join(token for choice in choices for token in choice.logprobs.tokens)


def ids_of(text: str) -> list[int]:
    return harmony_ids(Tokenizer(TOKENIZER), text)


# What nano never says


def test_text_before_a_call_is_content() -> None:
    said = (
        "<|channel|>analysis<|message|>A call.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a":1}<|call|>'
    )
    with serving_script(ScriptedEngine(said)) as url:
        message = ask(client_of(url), model="scripted").choices[0].message
    assert (message.reasoning, message.content) == ("A call.", "I look.")
    assert message.tool_calls[0].function.arguments == '{"a":1}'


def test_an_error_while_it_streams_is_told_without_internals() -> None:
    engine = ScriptedEngine(f"{FINAL}Yes.<|return|>")
    engine.error = RuntimeError("/home/somebody/secret.py failed")
    with serving_script(engine) as url:
        client = client_of(url)
        with pytest.raises(openai.APIError) as streamed:
            list(ask(client, model="scripted", stream=True))
        with pytest.raises(openai.InternalServerError) as whole:
            ask(client, model="scripted")
    for error in (streamed.value, whole.value):
        assert "secret" not in str(error) and error.code == "internal_error"


def test_a_form_that_cannot_be_followed_to_the_end_is_the_clients_mistake() -> None:
    engine = ScriptedEngine(f"{FINAL}Yes.<|return|>")
    engine.error = InputError("response_format: grammar: expected one that llguidance can follow")
    with serving_script(engine) as url:
        client = client_of(url)
        with pytest.raises(openai.BadRequestError, match="llguidance can follow") as whole:
            ask(client, model="scripted")
        with pytest.raises(openai.APIError, match="llguidance can follow") as streamed:
            list(ask(client, model="scripted", stream=True))
    for error in (whole.value, streamed.value):
        assert (error.param, error.type) == ("response_format", "invalid_request_error")


def test_options_reach_the_engine_under_their_names() -> None:
    engine = ScriptedEngine()
    options = {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "seed": 3,
        "logit_bias": {"5": 1},
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "top_p": 0.5,
        "stop": ["a"],
        "extra_body": {"top_k": 4, "min_p": 0.1},
    }
    with serving_script(engine) as url:
        ask(client_of(url), model="scripted", **options)
        ask(
            client_of(url), model="scripted", tool_choice="auto", parallel_tool_calls=True, user="u"
        )
    extra = options.pop("extra_body")
    assert engine.asked[0] == (SUM, options | extra | {"temperature": 0})
    assert engine.asked[1] == (SUM, {"temperature": 0})
