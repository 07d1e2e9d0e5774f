"""The harmony chat format: messages -> ids of a prompt, and ids of an answer -> what it says."""

from .events import Arguments, Finish, Piece, Reasoning, Text, ToolCall, as_messages
from .parse import AnswerParser, PieceStream, stop_ids, stream_answer
from .render import IDENTITY, render_chat

__all__ = [
    "IDENTITY",
    "AnswerParser",
    "Arguments",
    "Finish",
    "Piece",
    "PieceStream",
    "Reasoning",
    "Text",
    "ToolCall",
    "as_messages",
    "render_chat",
    "stop_ids",
    "stream_answer",
]
