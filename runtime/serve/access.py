"""Who may ask, and how much: what holds before a body is read."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

OPEN = ("/", "/health", "/openapi.json")  # paths that tell nothing of the model


class KeyGuard:
    """Lets in who has the API key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            # in constant time: how long a comparison takes tells how much of a key is right
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(
                    401,
                    "authorization: expected the API key of this server as a bearer token, found "
                    f"{'another' if given else 'none'}",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """Reads no body beyond a number of bytes. Starlette's own answers in plain text."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._most:
            return await self._error().response()(scope, receive, send)
        size = 0

        async def receive_some() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise self._error()
            return message

        await self._app(scope, receive_some, send)

    def _error(self) -> ApiError:
        return ApiError(
            413, f"body: expected at most {self._most} bytes, found more", code="body_too_large"
        )


def origins(given: Sequence[str]) -> list[str]:
    """Pages that may ask from a browser; without the slash that people copy with them."""
    return [origin.rstrip("/") for origin in given]
