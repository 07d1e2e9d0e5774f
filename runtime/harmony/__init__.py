"""The harmony chat format: messages -> ids of a prompt, and ids of an answer -> what it says."""

from .events import Arguments, Finish, Piece, Reasoning, Text, ToolCall, as_messages
from .parse import PieceStream, stop_ids
from .render import IDENTITY, render_chat
from .template import begun_answer, render_template

__all__ = [
    "IDENTITY",
    "Arguments",
    "Finish",
    "Piece",
    "PieceStream",
    "Reasoning",
    "Text",
    "ToolCall",
    "as_messages",
    "begun_answer",
    "render_chat",
    "render_template",
    "stop_ids",
]
