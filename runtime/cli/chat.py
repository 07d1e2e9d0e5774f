"""A conversation in the terminal."""

import sys
from collections.abc import Mapping

from ..engine import Model

Messages = list[dict[str, str]]


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
    said: Messages = []
    for piece in model.chat(messages, **options):  # type: ignore[arg-type]
        if not said or said[-1]["channel"] != piece.channel:
            if said and not (hide_analysis and said[-1]["channel"] == "analysis"):
                print(plain)
            said.append({"role": "assistant", "channel": piece.channel, "content": ""})
            if piece.channel == "analysis" and not hide_analysis:
                print(dim, end="")
        said[-1]["content"] += piece.text
        if piece.channel != "analysis" or not hide_analysis:
            print(piece.text, end="", flush=True)
    print(plain)
    return said
