"""What went wrong, as OpenAI's API says it: a status, and an object that names the field."""

import logging
import re
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
        return _invalid_body(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    LOG.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


async def respond_with_error(request: Request, error: Exception) -> Response:
    return api_error(error).response()


def _invalid_body(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of what pydantic found."""
    first = errors[0]
    kind, found = first["type"], first.get("input")
    if kind == "json_invalid":
        return ApiError(400, f"body: expected JSON, found none: {first['ctx']['error']}")
    path = first["loc"][1:]
    if kind == "value_error":  # of a check of ours
        return ApiError(400, f"body: {first['ctx']['error']}")
    if not path:  # no object at all, or bytes, which FastAPI does not read
        return ApiError(
            400, "body: expected a JSON object with Content-Type: application/json, found other"
        )
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]
    if kind == "missing":
        return ApiError(400, f"{param}: expected a value, found none", param=param)
    if kind == "extra_forbidden":
        message = f"{param}: expected fields that this server knows, found another; leave it out"
        return ApiError(400, message, param=param, code="unknown_parameter")
    return ApiError(400, f"{param}: {first['msg']}, found {found!r:.100}", param=param)
