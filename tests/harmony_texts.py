"""Messages, answers and golden texts of the chat format, shared by its tests."""

from __future__ import annotations

import re
from pathlib import Path

from osscompile.runtime.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "harmony"

ANSWER = (
    "<|channel|>analysis<|message|>Think.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Four.<|return|>"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, channel: str | None = None) -> dict[str, str]:
    message = {"role": "assistant", "content": text}
    return message if channel is None else {**message, "channel": channel}


def tool_call(id: str, name: str, arguments: object) -> dict[str, object]:
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


def golden(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which names of special tokens stand for these tokens."""
    parts = re.split(r"(<\|\w+\|>)", text)
    return [
        id
        for part in parts
        for id in ([tokenizer.special[part]] if part.startswith("<|") else tokenizer.encode(part))
    ]
