"""What went wrong, as OpenAI's API says it: a status, and an object that names the field."""

import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import InputError
from .json_text import json_bytes

LOG = logging.getLogger("osscompile.serve")

RETRY_SECONDS = "5"  # until a server or a replica that ended may be there again
INVALID = "invalid_request_error"
TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # by status; else INVALID or server
FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?(?:\.[\w\[\]]+)*): ")  # how our own messages begin


class Described(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every answer that is an error."""

    error: Described


class ApiError(HTTPException):  # which FastAPI lets through where it reads a body
    """An answer other than 200. `param`: the field of the body that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if status == 503:
            headers = {"Retry-After": RETRY_SECONDS} | dict(headers or {})
        super().__init__(status, message, headers)
        kind = "server_error" if status >= 500 else TYPES.get(status, INVALID)
        self.described = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> Response:
        content = json_bytes({"error": self.described})
        return Response(content, self.status_code, self.headers, "application/json")


class ReplicaEnded(ApiError):
    """What computed an answer ended first; who has told nothing of it yet may ask again."""

    def __init__(self) -> None:
        super().__init__(
            503,
            "the replica that computed this answer has ended; ask again",
            code="replica_ended",
        )


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; of a fault of ours, which is logged, only that it is."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        message = str(error)
        field = FIELD.match(message)
        return ApiError(400, message, param=field[1] if field else None)
    if isinstance(error, RequestValidationError):
        return _invalid_body(error.errors(), error.body)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    LOG.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


async def respond_with_error(request: Request, error: Exception) -> Response:
    return api_error(error).response()


def _invalid_body(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """What pydantic found in the first field that is wrong; if that may be of several types, of the
    type that fits best."""
    if len(errors[0]["loc"]) == 1:  # no object at all, or bytes, which FastAPI does not read
        return ApiError(
            400, "body: expected a JSON object with Content-Type: application/json, found other"
        )
    same = [error for error in errors if error["loc"][1] == errors[0]["loc"][1]]
    wrong = max(same, key=lambda error: _fit(error, body))
    path, _ = _fit(wrong, body)
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key:.100}" for key in path)[1:]
    if wrong["type"] == "missing":
        return ApiError(400, f"{param}: expected a value, found none", param=param)
    if wrong["type"] == "extra_forbidden":
        message = f"{param}: expected fields that this server knows, found another; leave it out"
        return ApiError(400, message, param=param, code="unknown_parameter")
    found = reprlib.repr(wrong.get("input"))  # which does not write all of a long list
    return ApiError(400, f"{param}: {wrong['msg']}, found {found:.100}", param=param)


def _fit(error: Mapping[str, Any], body: Any) -> tuple[list[str | int], bool]:
    """Where in the body it is, without the types that pydantic tried there; and whether that has
    the right type."""
    path: list[str | int] = []
    for key in error["loc"][1:]:
        if isinstance(body, list) and isinstance(key, int):
            path, body = [*path, key], body[key]
        elif isinstance(body, dict):
            path, body = [*path, key], body.get(key)
    return path, not error["type"].endswith("_type")
