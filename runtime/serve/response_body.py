"""The body of /v1/responses."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .bodies import (
    MAX_MESSAGES,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    Body,
    Count,
    Effort,
    NoEffect,
    Object,
    StreamOptions,
    given,
    several,
    tool_options,
)

MAX_INCLUDED = 16
LOGPROBS = "message.output_text.logprobs"


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    effort: Effort | None = None
    summary: NoEffect = None  # the reasoning itself is told
    generate_summary: NoEffect = None


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    strict: bool | None = None

    def response_format(self) -> Object:
        """As the chat API writes it."""
        described = {
            "name": self.name,
            "description": self.description,
            "schema": self.schema_,
            "strict": self.strict,
        }
        if self.type != "json_schema":  # which takes none of that, and is refused with it
            return {"type": self.type, **given(described)}
        return {"type": self.type, self.type: given(described)}


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: TextFormat | None = None
    verbosity: NoEffect = None


class FunctionTool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None

    def chat_tool(self) -> Object:
        """As the chat API writes it."""
        return {"type": "function", "function": given(self.model_dump(exclude={"type"}))}


class ResponseBody(Body):
    input: str | Annotated[list[Object], several(MAX_MESSAGES, 1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], several(MAX_TOOLS)] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    store: bool | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    stream_options: StreamOptions | None = None
    include: Annotated[
        Annotated[list[str], several(MAX_INCLUDED)] | None,
        Field(description=f"Only {LOGPROBS} adds something."),
    ] = None
    max_tool_calls: NoEffect = None

    def options(self) -> dict[str, Any]:
        """Those of `Engine.submit`."""
        told = self.top_logprobs or 0
        options = {
            "max_tokens": self.max_output_tokens,
            "reasoning": self.reasoning.effort if self.reasoning else None,
            "response_format": self.text.format.response_format()
            if self.text and self.text.format
            else None,
            "logprobs": told if told or LOGPROBS in (self.include or ()) else None,
        }
        tools = [tool.chat_tool() for tool in self.tools or ()]
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.keys() == {"type", "name"}:
            choice = {"type": choice["type"], "function": {"name": choice["name"]}}
        chosen = tool_options(tools, choice, self.parallel_tool_calls)
        return given(options) | chosen | self.sampling()
