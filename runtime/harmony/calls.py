"""Whole calls of tools, read from the pieces of an answer."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from .events import Arguments, Piece, ToolCall


@dataclass(frozen=True)
class Call:
    """A call of a tool. text: its arguments as the model wrote them."""

    id: str
    name: str
    text: str

    @property
    def arguments(self) -> dict[str, Any] | None:
        """The object that the text is as JSON, {} for none; None for a text that is no such
        object, as is code for python."""
        try:
            value = json.loads(self.text or "{}", parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def calls_of(pieces: Iterable[Piece]) -> list[Call]:
    """The calls among the pieces of an answer, in their order."""
    calls: dict[str, Call] = {}
    for piece in pieces:
        if isinstance(piece, ToolCall):
            calls[piece.id] = Call(piece.id, piece.name, "")
        elif isinstance(piece, Arguments):
            call = calls[piece.id]
            calls[piece.id] = Call(call.id, call.name, call.text + piece.delta)
    return list(calls.values())


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
