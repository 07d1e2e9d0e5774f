"""Show what a model says: all of it on a terminal, else the answer alone, or events."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TextIO

from ..harmony import Arguments, Finish, Piece, Reasoning, Text, ToolCall, ToolResult
from .pace import Pace
from .terminal import dims_text
from .waiting import Waiting

DIM, PLAIN = "\033[2m", "\033[0m"
# A terminal would obey these characters; it gets the signs that stand for them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}
CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

MOST_SHOWN = 400  # characters of a tool's result

KINDS = {
    Reasoning: "reasoning",
    Text: "text",
    ToolCall: "tool_call",
    Arguments: "arguments",
    ToolResult: "tool_result",
    Finish: "finish",
}


class View:
    """Where answers are shown.

    A terminal gets everything, dimmed what is not for the user: reasoning, calls of tools, and the
    beginning of their results. Else stdout gets the text of channel final, and stderr what else was
    said; with `events` stdout gets a line of JSON for each piece. `notes` is where what is no part
    of an answer belongs. That an answer was cut off is told on stderr, and if `verbose` what it
    took. `context`: the model's, in positions.
    """

    def __init__(
        self,
        context: int,
        *,
        hide_analysis: bool = False,
        events: bool = False,
        verbose: bool = False,
    ) -> None:
        self.notes = sys.stdout if sys.stdout.isatty() and not events else sys.stderr
        self._context, self._verbose = context, verbose
        self._hide_analysis, self._events = hide_analysis, events
        self._last: Piece | None = None  # on the line that is not ended yet

    def show(self, pieces: Iterator[Piece], said: list[Piece]) -> None:
        """Show pieces as they come. `said` gets each, and has them when this is interrupted."""
        pace, waiting = Pace(), Waiting("reading the prompt")
        try:
            for piece in pieces:
                said.append(piece)
                pace.take()
                if self._hide_analysis and isinstance(piece, Reasoning):
                    waiting.what = "reasoning"
                    continue
                waiting.end()
                self._show(piece)
                if isinstance(piece, Finish) and self._verbose:
                    self._warn(pace.describe(piece.usage, piece.reason))
                if isinstance(piece, ToolResult):
                    pace = Pace()  # of the next answer
        finally:
            waiting.end()
            self._end_line()
        if said and isinstance(said[-1], Finish):
            self._tell_end(said[-1])

    def _tell_end(self, finish: Finish) -> None:
        usage = finish.usage
        if finish.reason == "tool_calls":
            self._warn("The model waits for the result of a call, and no tool is run here.")
        elif finish.reason == "max_rounds":
            self._warn("The model still calls tools, which are not run any more.")
        elif finish.reason == "length":
            is_full = usage.prompt_tokens + usage.completion_tokens > self._context
            full = f"because the context of {self._context} positions is full: run with a larger "
            full += "--context, or /reset a chat"
            self._warn(f"The answer is cut off {full if is_full else 'by --max-tokens'}.")

    def _show(self, piece: Piece) -> None:
        if self._events:
            print(json.dumps(_event(piece)), flush=True)
            return
        if isinstance(piece, Finish):
            self._end_line()  # what a tool prints is no part of it
            return
        if self._last is not None and _begins_a_line(piece, self._last):
            self._end_line()
        self._last, stream = piece, self._stream(piece)
        text = _shown_text(piece)
        if stream.isatty():
            text = text.translate(CONTROLS)
        if not isinstance(piece, Text) and dims_text(stream):
            # The end goes with every piece: whatever ends the process, the terminal is undimmed.
            text = f"{DIM}{text}{PLAIN}"
        print(text, end="", file=stream, flush=True)

    def _end_line(self) -> None:
        if self._last is not None:
            print(file=self._stream(self._last), flush=True)
        self._last = None

    def _warn(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def _stream(self, piece: Piece) -> TextIO:
        return sys.stdout if piece.channel == "final" and isinstance(piece, Text) else self.notes


def _begins_a_line(piece: Piece, last: Piece) -> bool:
    if isinstance(piece, Arguments):
        return False
    same = type(piece) is type(last) and piece.channel == last.channel and not piece.begins
    return isinstance(piece, ToolCall | ToolResult) or not same


def _shown_text(piece: Piece) -> str:
    if isinstance(piece, ToolCall):
        return f"{piece.name}: "
    if isinstance(piece, ToolResult):
        more = "..." if len(piece.text) > MOST_SHOWN else ""
        return f"-> {piece.text[:MOST_SHOWN]}{more}"
    return piece.delta if isinstance(piece, Arguments) else piece.text


def _event(piece: Piece) -> dict[str, object]:
    fields = dataclasses.asdict(piece).items()
    told = {name: value for name, value in fields if value not in ("", (), False)}
    if isinstance(piece, Arguments):
        told["arguments"] = told.pop("delta", "")
    return {"type": KINDS[type(piece)], **told}
