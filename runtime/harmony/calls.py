"""Whole calls of tools, read from the pieces of an answer."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ..errors import InputError
from .events import Arguments, Piece, ToolCall, checked_pieces


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
    """The calls among the pieces of an answer or of a loop, in their order. Raises InputError for
    what are no such pieces."""
    calls: dict[str, Call] = {}
    for piece in checked_pieces(pieces):
        if isinstance(piece, ToolCall):
            calls[piece.id] = Call(piece.id, piece.name, "")
        elif isinstance(piece, Arguments):
            call = calls.get(piece.id)
            if call is None:
                raise InputError("pieces: expected a call before its arguments, found none")
            calls[piece.id] = replace(call, text=call.text + piece.delta)
    return list(calls.values())


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
