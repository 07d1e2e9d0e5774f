"""Who may ask, and how much: what holds before a body is read."""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Sequence

from starlette.datastructures import URL, Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

OPEN = ("/", "/health")  # paths that tell nothing of the model
# For a body; longer for a large one, of which so many bytes a second come.
BODY_SECONDS, BODY_RATE = 30.0, 10_000


class HostGuard:
    """Lets in requests to addresses and to these names. A page elsewhere can have its own name lead
    to this machine, and then ask as if it were from here."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self._app, self._names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_known(URL(scope=scope).hostname):
            error = ApiError(
                421,
                "Host: expected localhost, an address, or a name that this server was told of with "
                "--allow-host, found another",
            )
            return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _is_known(self, name: str | None) -> bool:
        try:
            ipaddress.ip_address(name or "")
        except ValueError:
            return name in self._names
        return True


class KeyGuard:
    """Lets in who has the API key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            scheme, _, key = given.partition(b" ")
            # in constant time: how long a comparison takes tells how much of a key is right
            is_same = hmac.compare_digest(key.strip(b" "), self._key)
            if scheme.lower() != b"bearer" or not is_same:
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
    """Reads no body beyond a number of bytes, or one that takes too long."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        is_too_large = announced.isdecimal() and int(announced) > self._most
        end, size, is_whole = asyncio.get_running_loop().time() + BODY_SECONDS, 0, False

        async def receive_some() -> Message:
            nonlocal size, is_whole
            if is_whole:  # next it is told that the client went away
                return await receive()
            if not is_too_large:
                message = await _within(end + size / BODY_RATE, receive())
                size += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
            if is_too_large or size > self._most:
                text = f"body: expected at most {self._most} bytes, found more"
                raise ApiError(413, text, code="body_too_large")
            return message

        await self._app(scope, receive_some, send)


async def _within(end: float, received: Awaitable[Message]) -> Message:
    try:
        async with asyncio.timeout_at(end):
            return await received
    except TimeoutError:
        raise ApiError(408, "body: expected all of it within a while, found a part") from None


def origins(given: Sequence[str]) -> list[str]:
    """Pages that may ask from a browser; without the slash that people copy with them."""
    return [origin.rstrip("/") for origin in given]
