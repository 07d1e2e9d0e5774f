"""Options that several commands have."""

import argparse
import math
import os

from ..fields import MAX_NUMBER


def add_kv_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kv-memory",
        type=_bytes_of_gigabytes,
        metavar="GB",
        help="of keys and values (default: what the context needs)",
    )


def utf8_text(text: str) -> str:
    """An argument; bytes of which the locale makes no text are taken for UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, found {text!a}") from None


def read_number(text: str) -> float:
    """NaN, which is within no limits, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _bytes_of_gigabytes(text: str) -> int:
    number = read_number(text) * 1e9
    if not 0 < number <= MAX_NUMBER:
        most = MAX_NUMBER // 10**9
        raise argparse.ArgumentTypeError(f"expected gigabytes, above 0 to {most}, found {text!r}")
    return int(number)
