"""Answers and the calls in them, run one after the other until the model needs no more."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..arguments import whole_number
from ..errors import InputError
from ..harmony import Arguments, Finish, Piece, ToolCall, ToolResult, as_messages
from ..harmony.calls import Call, calls_of
from ..stream import Stream
from ..tokenizer import Tokenizer
from .functions import PythonTool, result_text, unfinished_kind
from .kind import Misfit

Chat = Callable[..., Iterable[Piece]]  # messages and options -> the pieces of an answer
Executor = Callable[[str], object]  # code -> what it printed

MAX_ROUNDS = 20
PYTHON = "python"  # the builtin tool
LEAST_ROOM = 64  # positions of the context without which no result is asked for
MOST_CHARACTERS = 32  # that a token stands for; text that has more is cut before it is counted


class ToolLoop(Stream[Piece]):
    """The pieces of each answer, and after those of one that calls tools a ToolResult for each
    call; then the next answer. The last piece is the Finish of the last answer.

    Exceptions of a function, unknown tools and arguments that do not fit are results too, which
    the model sees. Results that take more than half of what is left of the context are cut, with a
    note. What is said after a call in the same answer, without its result, is left out. Whoever
    interrupts this ends the loop.
    """

    def __init__(
        self,
        chat: Chat,
        context: int,
        tokenizer: Tokenizer | None,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Callable[..., object]],
        python: Executor | None,
        max_rounds: int,
        options: Mapping[str, Any],
    ) -> None:
        self._chat, self._context, self._tokenizer = chat, context, tokenizer
        self._asked, self._said = messages, list[Piece]()
        self._tools = _read_tools(tools)
        self._python = python
        self._max_rounds = whole_number("max_rounds", max_rounds)
        self._options = {**options, "tools": [tool.definition for tool in self._tools.values()]}
        if "builtin_tools" in options:
            raise InputError("builtin_tools: expected what runs them, as `python`, found names")
        if python is not None:
            if not callable(python):
                raise InputError(f"python: expected a function of code, found {python!r:.100}")
            # An executor that says nothing of itself is taken for that of the training.
            self._options["builtin_tools"] = {PYTHON: getattr(python, "description", None)}
        super().__init__(self._run(self._ask()))

    @property
    def messages(self) -> list[Mapping[str, object]]:
        """The conversation so far: what was asked, and all that was said and called since."""
        return [*self._asked, *as_messages(self._said)]

    def _ask(self) -> Iterable[Piece]:
        return self._chat(self.messages, **self._options)

    def _run(self, answer: Iterable[Piece]) -> Generator[Piece, None, None]:
        num_calls = 0
        for round in range(1, self._max_rounds + 1):
            begin = len(self._said)
            for piece in _until_results(answer, num_calls):
                if isinstance(piece, Finish):
                    piece = self._with_reason(piece, round)
                self._said.append(piece)
                yield piece
            calls, end = calls_of(self._said[begin:]), self._said[-1:]
            if not end or not isinstance(end[0], Finish) or end[0].reason != "tool_calls":
                return
            channels = {p.id: p.channel for p in self._said[begin:] if isinstance(p, ToolCall)}
            room = self._room(end[0])
            for call in calls:
                text, is_error = self._result(call)
                text, used = self._cut(text, room // 2)
                room -= used
                result = ToolResult(channels[call.id], text, call.id, call.name, is_error)
                self._said.append(result)
                yield result
            num_calls += len(calls)
            self._options["tool_choice"] = "auto"  # one that forces a call has had it
            answer = self._ask()

    def _with_reason(self, finish: Finish, round: int) -> Finish:
        """Calls that are not run end the loop."""
        if finish.reason != "tool_calls":
            return finish
        if round == self._max_rounds:
            return replace(finish, reason="max_rounds")
        return finish if self._room(finish) >= LEAST_ROOM else replace(finish, reason="length")

    def _room(self, finish: Finish) -> int:
        """Positions of the context that are left after an answer."""
        return self._context - finish.usage.prompt_tokens - finish.usage.completion_tokens

    def _result(self, call: Call) -> tuple[str, bool]:
        """What the model is told, and whether it is an error."""
        try:
            if call.name in self._tools:
                return self._tools[call.name].call(call), False
            if call.name == PYTHON and self._python is not None:
                return result_text(self._python(call.text)), False
        except Misfit as error:
            return f"Error: {error}", True
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a tool raises, exit() too, the model is to know
            return f"Error: {type(error).__name__}: {error}", True
        names = [*self._tools, *([PYTHON] if self._python is not None else [])]
        return f"Error: there is no tool {call.name}; the tools are: {', '.join(names)}", True

    def _cut(self, text: str, most: int) -> tuple[str, int]:
        """Text of at most so many tokens, and a note if that is less than all; how many it has."""
        assert self._tokenizer is not None  # who has none cannot chat
        text = text.encode("utf-8", "replace").decode()  # what has no UTF-8 form cannot be told
        begin = text[: most * MOST_CHARACTERS]
        ids = self._tokenizer.encode(begin)
        if len(begin) == len(text) and len(ids) <= most:
            return text, len(ids)
        shown = self._tokenizer.decode(ids[:most]).rstrip("\ufffd")  # half a character
        note = f"\n[cut: the context has room for {len(shown)} of {len(text)} characters]"
        return f"{shown}{note}", most + len(self._tokenizer.encode(note))


def _read_tools(tools: Sequence[Callable[..., object]]) -> dict[str, PythonTool]:
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InputError(f"tools: expected a list of functions, found {tools!r:.100}")
    found: dict[str, PythonTool] = {}
    for i, function in enumerate(tools):
        where = f"tools[{i}]"
        if not callable(function):
            raise InputError(
                f"{where}: expected a function to run, found {function!r:.100}; to run calls of "
                "other tools yourself, use chat"
            )
        if kind := unfinished_kind(function):
            raise InputError(
                f"{where}: expected a function that returns its result, found {kind}; wrap it in "
                "one that runs it"
            )
        tool = PythonTool(where, function)
        if tool.name in found:
            raise InputError(f"{where}: expected a name of its own, found {tool.name!r} twice")
        found[tool.name] = tool
    return found


def _until_results(answer: Iterable[Piece], num_calls: int) -> Iterable[Piece]:
    """The pieces of an answer without what it says after a call, whose result it does not know;
    calls are counted through all answers."""
    called = 0
    for piece in answer:
        if isinstance(piece, ToolCall):
            called += 1
        if isinstance(piece, ToolCall | Arguments):
            yield replace(piece, id=f"call_{num_calls + called - 1}")
        elif not called or isinstance(piece, Finish):
            yield piece
