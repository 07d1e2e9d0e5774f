"""The body of /v1/completions."""

from typing import Annotated, Any

from pydantic import Field

from .bodies import MAX_CHOICES, MAX_MESSAGES, Body, Count, StreamOptions, given, several

MAX_LOGPROBS = 5
MAX_IDS = 1 << 20  # more than a context has
DEFAULT_TOKENS = 16  # OpenAI's

Ids = Annotated[list[int], several(MAX_IDS, 1)]


class CompletionBody(Body):
    prompt: (
        Annotated[str, Field(min_length=1)]
        | Ids
        | Annotated[list[str], several(MAX_MESSAGES, 1)]
        | Annotated[list[Ids], several(MAX_MESSAGES, 1)]
    )
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1, description="1.")] | None = None
    echo: Annotated[bool, Field(description="Not with logprobs.")] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream_options: StreamOptions | None = None

    def options(self, choice: int) -> dict[str, Any]:
        """Those of `Engine.submit`."""
        options = {"max_tokens": self.max_tokens or DEFAULT_TOKENS, "logprobs": self.logprobs}
        return given(options) | self.sampling(choice)
