"""The harmony chat format: messages -> ids of a prompt, and ids of an answer -> what it says."""

from .events import Arguments, Finish, Piece, Reasoning, Text, ToolCall, as_messages
from .parse import AnswerParser, stop_ids, stream_answer
from .render import IDENTITY, render_chat
from .template import begun_answer, render_template

__all__ = [
    "IDENTITY",
    "AnswerParser",
    "Arguments",
    "Finish",
    "Piece",
    "Reasoning",
    "Text",
    "ToolCall",
    "as_messages",
    "begun_answer",
    "render_chat",
    "render_template",
    "stop_ids",
    "stream_answer",
]
