"""Values of messages and tools, checked: InputError names where each stands."""

import json
from typing import Any

from ..errors import InputError


def read_word(where: str, value: object) -> str | None:
    """A name or channel: a blank within a header would begin its next word. None for None."""
    text = read_text(where, value)
    if text is not None and (not text or any(c.isspace() for c in text)):
        raise InputError(f"{where}: expected a word without blanks, found {text!r}")
    return text


def read_text(where: str, value: object) -> str | None:
    """Text that has a UTF-8 form; None for None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{where}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: expected valid Unicode, found an unpaired surrogate at character "
            f"{error.start}; decode the text with errors='replace'"
        ) from None
    return value


def need_text(where: str, value: object) -> str:
    """The same where there must be one."""
    text = read_text(where, value)
    if text is None:
        raise InputError(f"{where}: expected text, found None")
    return text


def read_json(where: str, value: object) -> Any:
    """A value in JSON's own types, e.g. a tuple as a list; its whole numbers are those that float64
    reaches, as which the prompt tells large ones."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return json.loads(text, parse_int=_read_int)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: expected what JSON can say, found {error}") from None


def _read_int(digits: str) -> int:
    """Raises OverflowError beyond float64."""
    number = int(digits)
    float(number)
    return number
