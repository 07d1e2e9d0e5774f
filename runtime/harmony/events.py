"""What a model says, as it says it: pieces of text, calls of tools, and why it ended."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import InputError
from ..sampler import Sample
from ..usage import Usage


@dataclass(frozen=True)
class Piece:
    """What became readable: `text` may be printed as it comes, and is "" where there is none.

    channel is analysis (the model's reasoning), commentary (beside tools, or before them), final
    (the answer) or what else the model wrote there; "" at the end. logprobs: where they were asked
    for, the tokens since the piece before, those of headers too, so that all pieces together have
    each token of the answer once. begins: this is the first piece of a message, which may be on the
    same channel as the one before. Neither is compared.
    """

    channel: str
    text: str
    logprobs: tuple[Sample, ...] = field(default=(), kw_only=True, compare=False)
    begins: bool = field(default=False, kw_only=True, compare=False)


@dataclass(frozen=True)
class Reasoning(Piece):
    """Text of the model's reasoning, on channel analysis."""


@dataclass(frozen=True)
class Text(Piece):
    """Text for the user: on channel final the answer, on others what goes with it."""


@dataclass(frozen=True)
class ToolCall(Piece):
    """A call begins. name: of a function as it was declared, else python, browser.search or what
    the model made up. id: of the call within its answer, "call_0" first."""

    text: str = field(default="", init=False)
    id: str
    name: str


@dataclass(frozen=True)
class Arguments(Piece):
    """More of the arguments of the call with this id: JSON, or code for python, as the model wrote
    it, which need not be valid."""

    text: str = field(default="", init=False)
    id: str
    delta: str


@dataclass(frozen=True)
class ToolResult(Piece):
    """What the model is told of the call with this id. is_error: an error of the call, or of the
    tool."""

    id: str
    name: str
    is_error: bool = False


@dataclass(frozen=True)
class Finish(Piece):
    """The answer has ended, its last event. reason: tool_calls (it waits for their results), stop
    (it is whole, or has come to a stop string or id), or length (it was cut off by max_tokens or
    the context's end, perhaps within a call); of a loop that ends with calls that are not run,
    max_rounds, or length if the context has no room for their results. usage: what the answer took;
    answers that say the same are equal, whatever they took."""

    channel: str = field(default="", init=False)
    text: str = field(default="", init=False)
    reason: str
    usage: Usage = field(default=Usage(), compare=False)


def as_messages(pieces: Iterable[Piece]) -> list[dict[str, object]]:
    """What was said in an answer, or in a loop of answers and results, as messages that go on with
    the conversation, each with its channel. Raises InputError for what are no such pieces."""
    messages: list[dict[str, object]] = []
    function: dict[str, str] | None = None
    for piece in checked_pieces(pieces):
        last = messages[-1] if messages else {}
        if isinstance(piece, ToolCall):
            function = {"name": piece.name, "arguments": ""}
            call = {"id": piece.id, "type": "function", "function": function}
            message = {"role": "assistant", "channel": piece.channel, "content": None}
            messages.append({**message, "tool_calls": [call]})
        elif isinstance(piece, Arguments):
            if function is None:
                raise InputError("pieces: expected a call before its arguments, found none")
            function["arguments"] += piece.delta
        elif isinstance(piece, ToolResult):
            result = {"tool_call_id": piece.id, "content": piece.text}
            messages.append({"role": "tool", **result})
        elif isinstance(piece, Finish):
            function = None
        elif _goes_on(piece, last):
            last["content"] = f"{last['content']}{piece.text}"
        else:
            content = {"channel": piece.channel, "content": piece.text}
            messages.append({"role": "assistant", **content})
    return messages


def _goes_on(piece: Piece, last: Mapping[str, object]) -> bool:
    """Whether a piece of text belongs to the last message."""
    is_text = last.get("role") == "assistant" and last["content"] is not None
    return is_text and last["channel"] == piece.channel and not piece.begins


def checked_pieces(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces one by one, since they may come from a model that still generates them."""
    if not isinstance(pieces, Iterable):
        raise InputError(f"pieces: expected those of an answer, found {pieces!r:.100}")
    for piece in pieces:
        if not isinstance(piece, Piece):
            raise InputError(
                f"pieces: expected those of an answer, found among them {piece!r:.100}"
            )
        yield piece
