"""Run a command line: errors become one message, and a status."""

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from ..errors import OsscompileError, printable
from ..script import INTERRUPTED

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


class Parser(argparse.ArgumentParser):
    """The parser of all commands. argparse passes over a help that cannot be written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)


class CommandParser(Parser):
    """The parser of one command: options may stand before, between and after other arguments."""

    _is_intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """What the parser of all commands calls. argparse mixes in another method, which calls this
        one again in some versions of Python."""
        if self._is_intermixing:
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixing = False


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; 0, or 1 after an error of ours or of the system, which
    goes to stderr as one message, or INTERRUPTED."""
    _mend_streams()
    warnings.showwarning = lambda message, *_: _say(printable(f"warning: {message}"))
    try:
        try:
            arguments = parser.parse_args(argv)
            arguments.command(arguments)
        finally:  # also when a help ends it
            sys.stdout.flush()
        return 0
    except OsscompileError as error:
        _say(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        _say(f"\n{parser.prog}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away: nothing more to say
        pass
    except OSError as error:  # without a file's name it comes from our own output
        what = "" if error.filename else "expected output that can be written, found: "
        _say(printable(f"{parser.prog}: {what}{error}"))
    _forget_output()
    return 1


def end_process(status: int) -> NoReturn:
    """End with a status; after an interrupt at once, without a wait for threads that still work on
    what nobody wants any more."""
    if status == INTERRUPTED:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _mend_streams() -> None:
    """What is closed is as if it led to nowhere; a character that the terminal does not have is
    replaced, and bytes that are no text are kept for who reads them to find. Messages and bars that
    cannot be written are dropped: what a command makes is what counts."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if isinstance(getattr(sys.stderr, "buffer", None), io.BufferedWriter | io.FileIO):
        encoding, raw = sys.stderr.encoding, _Droppable(sys.stderr.fileno())
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True
        )


class _Droppable(io.RawIOBase):
    """A file of which no write fails."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError:
            return len(data)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # who cannot be told is not told
        print(message, file=sys.stderr, flush=True)


def _forget_output() -> None:
    """What could not be written would be tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
