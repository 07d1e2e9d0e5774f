"""How answers go out: whole, or as server-sent events while they are told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .answers import Answers
from .errors import ReplicaEnded, api_error
from .json_text import json_bytes

CLIENT_WENT_AWAY = 499  # nginx's status; nobody reads it


def json_reply(content: object) -> Response:
    return Response(json_bytes(content), media_type="application/json")


def event(data: object, name: str | None = None) -> bytes:
    """A server-sent event. JSON has no line breaks, which would end it."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json_bytes(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def whole_reply(
    request: Request,
    answers: Answers,
    content: Coroutine[Any, Any, object],
    again: Callable[[], Awaitable[Response]],
) -> Response:
    """What `content` makes of the answers, which are cancelled when the client goes away; or what
    `again` gives, where a replica ended before they were whole."""
    made = asyncio.create_task(content)
    gone = asyncio.create_task(_client_goes(request))
    try:
        await asyncio.wait((made, gone), return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            return Response(status_code=CLIENT_WENT_AWAY)
        return json_reply(made.result())
    except ReplicaEnded:
        pass
    finally:
        made.cancel()
        gone.cancel()
        answers.close()
    return await again()


class StreamedReply(StreamingResponse):
    """Events while they are made of the answers, which are cancelled when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], answers: Answers) -> None:
        # proxies must not collect events
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if it never began
            self._answers.close()


async def with_error(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The status has gone out: who reads is told of an error as the last event."""
    try:
        async for data in events:
            yield data
    except Exception as error:  # whatever it is, `api_error` decides what is told of it
        yield event({"error": api_error(error).described})


async def _client_goes(request: Request) -> None:
    message: dict[str, Any] = {"type": ""}
    while message["type"] != "http.disconnect":
        message = dict(await request.receive())
