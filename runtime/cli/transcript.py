"""Conversations as files of JSON, in the shape of OpenAI's messages."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..harmony.messages import read_messages
from .prompt import read_text_file

Messages = list[dict[str, object]]


def save_messages(path: Path, messages: Sequence[dict[str, object]]) -> None:
    """Write a new file, whole or not at all. Raises InputError."""
    text = json.dumps(messages, indent=1, ensure_ascii=False) + "\n"
    try:
        file = path.open("x", encoding="utf-8")
        try:
            with file:
                file.write(text)
        except BaseException:  # an interrupt too: no half of a conversation stays
            path.unlink()
            raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        found = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{path}: expected a new file that can be written, found: {found}; name another"
        ) from None


def load_messages(path: Path) -> Messages:
    """What `save_messages` wrote. Raises InputError."""
    text = read_text_file(path)
    try:
        messages: Messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected messages of /save, found no JSON: {error}") from None
    read_messages(messages)  # raises for what is no conversation
    return messages
