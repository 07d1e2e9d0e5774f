"""The harmony chat format: messages -> ids of a prompt, and ids of an answer -> what it says."""

from .calls import Call, calls_of
from .events import Arguments, Finish, Piece, Reasoning, Text, ToolCall, ToolResult, as_messages
from .parse import PieceStream, stop_ids
from .render import IDENTITY, render_chat
from .template import begun_answer, render_template

__all__ = [
    "IDENTITY",
    "Arguments",
    "Call",
    "Finish",
    "Piece",
    "PieceStream",
    "Reasoning",
    "Text",
    "ToolCall",
    "ToolResult",
    "as_messages",
    "begun_answer",
    "calls_of",
    "render_chat",
    "render_template",
    "stop_ids",
]
