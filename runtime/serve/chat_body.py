"""The body of /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .bodies import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    Body,
    Count,
    Effort,
    Message,
    NoEffect,
    Object,
    StreamOptions,
    given,
    tool_options,
)


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: Effort | None = None
    tools: list[Object] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: Object | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: NoEffect = None
    store: NoEffect = None
    verbosity: NoEffect = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("expected logprobs: true beside top_logprobs, found none")
        return self

    def options(self, choice: int) -> dict[str, Any]:
        """Those of `Engine.submit`."""
        options = {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "reasoning": self.reasoning_effort,
            "response_format": self.response_format,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        tools = tool_options(self.tools, self.tool_choice, self.parallel_tool_calls)
        return given(options) | tools | self.sampling(choice)
