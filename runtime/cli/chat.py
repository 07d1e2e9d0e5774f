"""A conversation in the terminal."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..errors import InputError, OsscompileError
from ..harmony import Piece, as_messages
from ..harmony.render import REASONING_EFFORTS
from .lines import prepare_editing, read_message
from .transcript import Messages, load_messages, save_messages
from .view import View

GREETING = "Ask something; /help lists the commands, /bye or Ctrl-D ends the chat."
HELP = """\
/effort EFFORT   how much the model reasons: low, medium or high
/reset           begin a new conversation
/save FILE       write the conversation, as JSON
/load FILE       go on with one that was saved
/bye             end the chat (also Ctrl-D, or Ctrl-C twice)
Ctrl-C ends an answer. Lines pasted at once are one message, and so are lines between \"\"\"."""


# Messages and options -> the pieces of the answer.
Answer = Callable[..., Iterator[Piece]]


def converse(answer: Answer, messages: Messages, options: Mapping[str, object], view: View) -> None:
    """Answer questions, each in the light of those before, until the chat is ended. `messages` are
    those that a conversation begins with; `answer` and its `options` are those of `Model.chat`."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        prepare_editing()
        _Chat(answer, messages, options, view).run()
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    """Unwinding gives back the terminal, whose modes change while a line is edited."""
    sys.exit(128 + number)


class _Chat:
    def __init__(
        self, answer: Answer, messages: Messages, options: Mapping[str, object], view: View
    ) -> None:
        self._ask, self._options, self._view = answer, dict(options), view
        self._first, self._messages = messages, messages
        # While an answer is under way: the conversation up to its question, and what was said.
        self._pending: tuple[Messages, list[Piece]] | None = None
        self._num_interrupts = 0  # since the last input
        self._is_over = False

    def run(self) -> None:
        """Take turns. An interrupt is only counted here, and the next turn says what it did: so
        one that follows at once finds nothing half done."""
        self._say(GREETING)
        while not self._is_over:
            try:
                self._take_turn()
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._num_interrupts += 1
            except OsscompileError as error:
                self._say(f"{error}")

    def _take_turn(self) -> None:
        if self._pending is not None:
            self._end_answer("interrupted")
        elif self._num_interrupts == 1:
            self._say("\nCtrl-C again, Ctrl-D or /bye ends the chat.")
        elif self._num_interrupts > 1:
            self._say("")
            self._is_over = True
            return
        text = read_message(self._view.notes)
        self._num_interrupts = 0
        if text.startswith("/") and "\n" not in text:
            self._obey(*text.split(maxsplit=1))
        elif text:
            self._answer(text)

    def _answer(self, question: str) -> None:
        conversation: Messages = [*self._messages, {"role": "user", "content": question}]
        said: list[Piece] = []
        self._pending = conversation, said
        try:
            self._view.show(self._ask(conversation, **self._options), said)
        except OsscompileError as error:
            self._pending = None
            self._say(f"{error}")
            self._say("The question is taken back; /reset begins a new conversation.")
        else:
            self._end_answer()

    def _end_answer(self, how: str = "") -> None:
        """Keep what was said; say what becomes of an answer that is not whole."""
        assert self._pending is not None
        conversation, said = self._pending
        if said:
            self._messages = [*conversation, *as_messages(said)]
        if how:
            kept = "what was said is kept" if said else "the question is taken back"
            self._say(f"({how}; {kept})")
        self._pending, self._num_interrupts = None, 0

    def _obey(self, command: str, argument: str = "") -> None:
        match command:
            case "/help":
                self._say(HELP)
            case "/effort":
                if argument not in REASONING_EFFORTS:
                    known = ", ".join(REASONING_EFFORTS)
                    raise InputError(f"/effort: expected one of {known}, found {argument!r}")
                self._options["reasoning"] = argument
                self._say(f"reasoning effort: {argument}")
            case "/reset":
                self._messages = self._first
                self._say("a new conversation begins")
            case "/save":
                save_messages(_path(command, argument), self._messages)
                self._say(f"wrote {argument}")
            case "/load":
                self._messages = load_messages(_path(command, argument))
                self._say(f"read {len(self._messages)} messages")
            case "/bye":
                self._is_over = True
            case _:
                known = ", ".join(line.split()[0] for line in HELP.splitlines() if line[0] == "/")
                raise InputError(f"expected one of {known}, /help, found {command}")

    def _say(self, message: str) -> None:
        print(message, file=self._view.notes, flush=True)


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise InputError(f"{command}: expected the name of a file, found none")
    return Path(os.path.expanduser(argument))
