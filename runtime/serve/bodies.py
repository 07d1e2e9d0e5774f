"""What the bodies of requests have in common. Their models are OpenAI's fields, each checked; the
OpenAPI description is made of them. A field that is not here is refused: to leave it out silently
could change what a client means."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

MAX_MESSAGES = 4096
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_TOOLS = 128
MAX_SEED = 1 << 63
SAMPLING = (  # options of the engine by the same names
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "stop",
)


def several(most: int, least: int = 0) -> Any:
    """So many in a list, of which none is checked after a wrong one."""
    return Field(min_length=least, max_length=most, fail_fast=True)


Count = Annotated[int, Field(ge=1)]
Effort = Literal["low", "medium", "high"]
Object = dict[str, Any]
_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _PART}]}
_CALLS = {"type": "array", "items": {"type": "object"}}
# The engine checks messages itself; this describes them.
Message = Annotated[
    Object,
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "required": ["role", "content"],
                    "properties": {
                        "role": {"enum": ["user", "system", "developer"]},
                        "content": _CONTENT,
                    },
                },
                {
                    "type": "object",
                    "required": ["role", "content", "tool_call_id"],
                    "properties": {
                        "role": {"const": "tool"},
                        "content": _CONTENT,
                        "tool_call_id": _TEXT,
                    },
                },
                {
                    "type": "object",
                    "required": ["role", "content"],
                    "properties": {
                        "role": {"const": "assistant"},
                        "content": {"anyOf": [_CONTENT, {"type": "null"}]},
                        "reasoning": _TEXT,
                        "tool_calls": _CALLS,
                    },
                },
            ]
        }
    ),
]
# What other servers act on: it changes no answer of this one.
NoEffect = Annotated[Any, Field(description="Accepted; it changes nothing here.")]


class Body(BaseModel):
    """The fields that every request has."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(description="The name that /v1/models tells.")]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, description="0: all tokens.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = None
    stop: str | Annotated[list[str], several(MAX_STOPS)] | None = None
    user: NoEffect = None
    metadata: NoEffect = None
    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_retention: NoEffect = None
    prompt_cache_options: NoEffect = None

    def sampling(self, choice: int = 0) -> dict[str, Any]:
        """Options of the engine for one of several choices."""
        seed = None if self.seed is None else (self.seed + choice) % MAX_SEED
        return given({name: getattr(self, name) for name in SAMPLING} | {"seed": seed})


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: NoEffect = None


def given(options: Object) -> Object:
    """Without those that are None."""
    return {name: value for name, value in options.items() if value is not None}


def tool_options(
    tools: list[Object] | None, choice: str | Object | None, parallel: bool | None
) -> Object:
    """Options of the engine. What it does anyway, it is not asked for."""
    does_anyway = ("auto",) if tools else ("auto", "none")
    return given(
        {
            "tools": tools or None,
            "tool_choice": None if choice in does_anyway else choice,
            "parallel_tool_calls": None if parallel else parallel,
        }
    )
