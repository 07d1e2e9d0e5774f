"""The body of /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import InputError
from .bodies import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    Body,
    Count,
    Effort,
    Message,
    NoEffect,
    Object,
    StreamOptions,
    given,
    several,
    tool_options,
)


class ChatBody(Body):
    messages: Annotated[list[Message], several(MAX_MESSAGES, 1)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: Effort | None = None
    tools: Annotated[list[Object], several(MAX_TOOLS)] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: Object | None = None
    modalities: Annotated[list[Literal["text"]], several(1)] | None = None
    prediction: NoEffect = None
    store: NoEffect = None
    verbosity: NoEffect = None

    def options(self, choice: int) -> dict[str, Any]:
        """Those of `Engine.submit`. Raises InputError."""
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs: expected logprobs: true beside it, found none")
        options = {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "reasoning": self.reasoning_effort,
            "response_format": self.response_format,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        tools = tool_options(self.tools, self.tool_choice, self.parallel_tool_calls)
        return given(options) | tools | self.sampling(choice)
