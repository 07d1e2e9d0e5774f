"""The prompt of `run`: its argument, a file, and what comes through a pipe."""

import io
import os
import stat
import sys
from pathlib import Path

from ..errors import InputError

STDIN = "-"


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The argument, the file and what is piped, as far as they are there, a blank line between two;
    None if a person is to be asked instead. An argument of STDIN asks for the pipe alone, as does
    a file of that name.

    Raises InputError for what is no text, or empty.
    """
    parts = [] if prompt is None or prompt == STDIN else [prompt]
    if file is not None and str(file) != STDIN:
        parts.append(read_text_file(file))
    if STDIN in (prompt, str(file)) or _is_piped():
        parts.append(_decode("stdin", sys.stdin.buffer.read()))
    elif not parts and sys.stdin.isatty():
        return None
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise InputError(
            "prompt: expected text as an argument, by -f or on stdin, found none; on a terminal "
            "leave it out for a chat"
        )
    return text


def read_text_file(path: Path) -> str:
    """A file's text without the ends of its last lines. Raises InputError."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        found = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: expected a text file that can be read, found: {found}") from None
    return _decode(str(path), content)


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: expected UTF-8 text, found the byte {content[error.start]:#04x} at "
            f"{error.start}; convert it first"
        ) from None


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file: only they are read without being asked for."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except io.UnsupportedOperation:  # whoever replaced stdin by an object has no pipe there
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
