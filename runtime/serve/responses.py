"""/v1/responses: items, and the response to them, which a later request may go on with."""

import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..errors import InputError
from ..harmony import Finish, Piece
from ..sampling_options import Sampling
from ..usage import Usage
from .answers import Answers
from .errors import ApiError, api_error
from .replies import StreamedReply, event, whole_reply
from .response_body import ResponseBody
from .response_events import Event, OutputItems
from .response_input import as_sent, read_input
from .service import Service

CUT = {"length": "max_output_tokens"}  # why a response is incomplete, by its finish reason


async def create_response(service: Service, body: ResponseBody, request: Request) -> Response:
    service.check_model(body.model)
    before = (
        [] if body.previous_response_id is None else service.store.get(body.previous_response_id)
    )
    messages = [*before, *read_input(body.input)]
    instructed = [{"role": "developer", "content": body.instructions}] if body.instructions else []
    question = ([*instructed, *messages], [body.options()])
    try:
        answers = await service.desk.ask([question], len(await request.body()))
    except InputError as error:
        raise as_sent(error, body.input, len(instructed) + len(before)) from None
    response = _Response(service, body, messages)
    if body.stream:
        return StreamedReply(response.stream(answers), answers)
    again = partial(create_response, service, body, request)
    return await whole_reply(request, answers, response.whole(answers), again)


class _Response:
    """The answer to one request; `messages` are kept for those that go on with it."""

    def __init__(
        self, service: Service, body: ResponseBody, messages: list[dict[str, Any]]
    ) -> None:
        self._store = service.store if body.store is not False else None
        self._messages = messages
        options = body.options()
        self._output = OutputItems(service.logprobs if "logprobs" in options else None)
        self._told = _echo(body, service.sampling) | {
            "id": f"resp_{uuid.uuid4().hex}",
            "created_at": int(time.time()),
            "model": service.name,
            "status": "in_progress",
            "output": [],
            "usage": None,
        }
        self._sequence_number = 0

    async def whole(self, answers: Answers) -> dict[str, Any]:
        async for _ in self._events(answers):
            pass
        return self._told

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        try:
            async for told in self._events(answers):
                yield self._event(told)
        except Exception as error:  # whatever it is, `api_error` decides what is told of it
            described = api_error(error).described
            code = "server_error" if described["type"] == "server_error" else "invalid_prompt"
            failed = {"code": described["code"] or code, "message": described["message"]}
            self._told |= {"status": "failed", "error": failed, "output": self._output.items}
            yield self._event(self._state("failed"))

    async def _events(self, answers: Answers) -> AsyncIterator[Event]:
        yield self._state("created")
        yield self._state("in_progress")
        last: Piece | None = None
        async for _, last in answers.told():
            for told in self._output.push(last):
                yield told
        if not isinstance(last, Finish):
            raise ApiError(500, "the answer ended before it was whole", code="internal_error")
        status = "incomplete" if last.reason in CUT else "completed"
        for told in self._output.finish(status):
            yield told
        self._told |= {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": CUT[last.reason]} if last.reason in CUT else None,
            "output": self._output.items,
            "usage": _usage_object(last.usage),
        }
        if self._store is not None:
            said = read_input(self._output.items)
            self._store.put(self._told["id"], [*self._messages, *said])
        yield self._state(status)

    def _state(self, name: str) -> Event:
        return {"type": f"response.{name}", "response": {**self._told}}

    def _event(self, told: Event) -> bytes:
        numbered = told | {"sequence_number": self._sequence_number}
        self._sequence_number += 1
        return event(numbered, told["type"])


def _echo(body: ResponseBody, default: Sampling) -> dict[str, Any]:
    """What a response says of its request."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    tools = [
        {"description": None, "parameters": None, "strict": None} | tool.model_dump()
        for tool in body.tools or ()
    ]
    return {
        "id": "",
        "object": "response",
        "created_at": 0,
        "completed_at": None,
        "status": "",
        "error": None,
        "incomplete_details": None,
        "model": "",
        "previous_response_id": body.previous_response_id,
        "instructions": body.instructions,
        "output": [],
        "tools": tools,
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": {"type": "text"}} | text,
        "reasoning": {
            "effort": (body.reasoning and body.reasoning.effort) or "medium",
            "summary": body.reasoning and body.reasoning.summary,
        },
        "temperature": default.temperature if body.temperature is None else body.temperature,
        "top_p": default.top_p if body.top_p is None else body.top_p,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "top_logprobs": body.top_logprobs or 0,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "truncation": "disabled",
        "store": body.store is not False,
        "background": False,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "user": body.user,
    }


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
