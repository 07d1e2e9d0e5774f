"""Read messages from a person at a terminal: edited lines, pasted lines, and blocks in quotes."""

import select
import sys
from typing import TextIO

from ..errors import InputError
from .terminal import takes_codes

QUOTES = '"""'
PASTE_SECONDS = 0.05  # terminals pass on long pastes in portions
# readline keeps bytes that may begin a character until others end it, and at the end of a line
# drops them. So the key that ends a line types three characters first, which push out up to three
# such bytes, and takes them away again. No terminal sends the names that the functions have here:
# whoever has bound other keys to them, or others to these, keeps those.
END_OF_LINE, BACKSPACE, ACCEPT = (rf"\e[990{number}~" for number in range(3))
BINDINGS = (
    f'"{END_OF_LINE}": end-of-line',
    f'"{BACKSPACE}": backward-delete-char',
    f'"{ACCEPT}": accept-line',
    rf'"\C-m": "{END_OF_LINE}\303\251\303\251\303\251{BACKSPACE * 3}{ACCEPT}"',
)


def prepare_editing() -> None:
    """Let `input` edit lines and know earlier ones, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    if "libedit" in (readline.__doc__ or ""):
        return
    if takes_codes(sys.stdout):
        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one input
    if (sys.stdin.encoding or "").lower() == "utf-8":
        for binding in BINDINGS:
            readline.parse_and_bind(binding)


def read_message(notes: TextIO) -> str:
    """The next message: a line that begins with a slash, else a line and those pasted with it, or
    the lines from QUOTES to QUOTES. The prompt goes to `notes`.

    Raises EOFError at the end, KeyboardInterrupt, and InputError for what is no text.
    """
    line = _read_line("> ", notes)
    if line.lstrip().startswith(QUOTES):
        text = line.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + _read_line("... ", notes)
        text = text.rstrip().removesuffix(QUOTES)
    else:
        text = line
        while not line.startswith("/") and select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            try:
                text += "\n" + _read_line("", notes)
            except EOFError:
                break
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that were kept
        raise InputError(
            f"input: expected {sys.stdin.encoding} text, found other bytes; type it again"
        ) from None
    return text.strip()


def _read_line(prompt: str, notes: TextIO) -> str:
    if notes is sys.stdout:
        return input(prompt)
    print(prompt, end="", file=notes, flush=True)  # `input` would print it to stdout
    return input()
