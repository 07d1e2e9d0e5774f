"""What holds of every route: how a body is read, and how errors are told."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .beside import beside
from .errors import ApiError, api_error
from .read_json import read_json
from .replies import CLIENT_WENT_AWAY


class Route(APIRoute):
    """Answers with an error whatever it is, so that what stands around routes sees an answer:
    Starlette's own place for faults is outside of all, and there they are raised again."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(_Request(request.scope, request.receive))
            except Exception as error:  # whatever it is, `api_error` decides what is told of it
                if ClientDisconnect in (type(error), type(error.__cause__)):
                    return Response(status_code=CLIENT_WENT_AWAY)
                return api_error(error).response()

        return answer


class _Request(Request):
    """Reads its JSON beside the event loop, and within limits."""

    async def json(self) -> Any:
        encoding = self.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ApiError(
                415, f"Content-Encoding: expected none, found {encoding!r:.100}; send it as it is"
            )
        body = await self.body()
        return await beside(len(body), read_json, body)
