"""A conversation in the terminal."""

import sys
from collections.abc import Mapping

from ..engine import Model
from ..harmony import Arguments, Finish, Piece, Reasoning, ToolCall, as_messages

Messages = list[dict[str, object]]


def converse(
    model: Model, messages: Messages, hide_analysis: bool, options: Mapping[str, object]
) -> None:
    """Ask for questions, and answer each in the light of those before, until an empty line."""
    print("Ask something; an empty line or Ctrl-D ends the chat.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        try:
            messages += answer(model, messages, hide_analysis, options)
        except KeyboardInterrupt:  # ends the answer, not the chat
            print()
            messages.pop()


def answer(
    model: Model, messages: Messages, hide_analysis: bool, options: Mapping[str, object]
) -> Messages:
    """Print an answer as it comes; return it as messages of the history. `options`: of
    `Model.chat`."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    said: list[Piece] = []
    shown: Piece | None = None
    for piece in model.chat(messages, **options):  # type: ignore[arg-type]
        said.append(piece)
        if isinstance(piece, Finish) or (hide_analysis and isinstance(piece, Reasoning)):
            continue
        if shown is None or shown.channel != piece.channel or isinstance(piece, ToolCall):
            print("" if shown is None else f"{plain}\n", end="")
            print(dim if isinstance(piece, Reasoning) else "", end="")
        shown = piece
        print(_shown_text(piece), end="", flush=True)
    print(plain)
    return as_messages(said)


def _shown_text(piece: Piece) -> str:
    if isinstance(piece, ToolCall):
        return f"{piece.name}: "
    return piece.delta if isinstance(piece, Arguments) else piece.text
