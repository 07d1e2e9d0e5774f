"""The answers that one request waits for: asked of the engine, read together, and cancelled when
their reader goes away."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ..usage import Usage
from .beside import beside
from .errors import ApiError
from .gate import Gate
from .metrics import Metrics

Prompt: TypeAlias = Sequence[int] | Sequence[Mapping[str, object]]
# A prompt, and the options of `Engine.submit` for each of the choices that answer it.
Question: TypeAlias = tuple[Prompt, Sequence[dict[str, Any]]]
_Mailbox: TypeAlias = "asyncio.Queue[tuple[int, Any] | Exception | None]"


class Asked(Protocol):
    """What `Engine.submit` gives: see Request."""

    @property
    def usage(self) -> Usage: ...
    @property
    def finish_reason(self) -> str | None: ...
    def cancel(self) -> None: ...
    def __aiter__(self) -> AsyncIterator[Any]: ...


class Asks(Protocol):
    """What of an Engine is used here."""

    def submit(self, prompt: Any, **options: Any) -> Asked: ...


@dataclass(frozen=True)
class Desk:
    """Where answers are asked for."""

    engine: Asks
    gate: Gate
    metrics: Metrics
    _open: set["Answers"] = field(default_factory=set)

    async def ask(self, questions: Sequence[Question], size: int) -> "Answers":
        """The answers to questions from a body of `size` bytes. Raises ApiError without room for
        them, InputError for bad ones."""
        answers = Answers(self, questions, size)
        self.gate.enter(answers.count)
        self._open.add(answers)
        try:
            await answers.begin()
        except BaseException:
            answers.close()
            raise
        return answers

    def leave(self, answers: "Answers", seconds: float) -> None:
        """They have ended, after so long."""
        self._open.discard(answers)
        self.gate.leave(answers.count, seconds)

    def cancel(self) -> None:
        """Whoever still waits is told that this server ends."""
        for answers in self._open:
            answers.cancel()


class Answers:
    """All that one HTTP request asked for. It must `close` them: only then is their room free."""

    def __init__(self, desk: Desk, questions: Sequence[Question], size: int) -> None:
        self._desk, self._size, self._start = desk, size, time.perf_counter()
        self._choices: list[_Choice] = []
        for prompt, each in questions:
            first: _Choice | None = None
            for options in each:
                self._choices.append(_Choice(prompt, options, first))
                first = first or self._choices[-1]
        self._is_open = True

    @property
    def count(self) -> int:
        return len(self._choices)

    async def begin(self) -> None:
        """Ask for the first choice of each prompt. The others follow once it is told: its prompt is
        computed then, and kept. Raises InputError."""
        for choice in self._choices:
            if choice.first is None:
                await self._ask(choice)

    @property
    def usage(self) -> Usage:
        """What all of them took; a prompt counts once."""
        total = Usage()
        for choice in self._choices:
            usage, is_first = choice.usage, choice.first is None
            total = Usage(
                total.prompt_tokens + usage.prompt_tokens * is_first,
                total.cached_tokens + usage.cached_tokens * is_first,
                total.completion_tokens + usage.completion_tokens,
                total.reasoning_tokens + usage.reasoning_tokens,
            )
        return total

    async def told(self) -> AsyncIterator[tuple[int, Any]]:
        """Which answer, and what it tells, as it is told. Raises what ended one of them."""
        if self.count == 1:
            async with contextlib.aclosing(self._read(self._choices[0])) as told:
                async for piece in told:
                    yield 0, piece
            return
        mailbox: _Mailbox = asyncio.Queue()
        readers = [asyncio.create_task(self._forward(i, mailbox)) for i in range(self.count)]
        try:
            for _ in readers:  # each ends with None
                while (told_next := await mailbox.get()) is not None:
                    if isinstance(told_next, Exception):
                        raise told_next
                    yield told_next
        finally:
            for reader in readers:
                reader.cancel()

    def cancel(self) -> None:
        """Whatever has not ended does so within a step."""
        for choice in self._choices:
            if choice.request is not None:
                choice.request.cancel()

    def close(self) -> None:
        """Nobody reads them any more; a second call changes nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self.cancel()
        for choice in self._choices:
            self._desk.metrics.count_tokens(choice.usage)
        self._desk.leave(self, time.perf_counter() - self._start)

    async def _ask(self, choice: "_Choice") -> Asked:
        submit = self._desk.engine.submit
        asked = await beside(self._size, submit, choice.prompt, **choice.options)
        choice.request = asked
        if not self._is_open:  # it was closed meanwhile
            asked.cancel()
        return asked

    async def _read(self, choice: "_Choice") -> AsyncGenerator[Any, None]:
        if choice.first is not None:
            await choice.first.begun.wait()
        request = choice.request or await self._ask(choice)
        before: float | None = None
        try:
            async for piece in request:
                before = self._time(before)
                choice.begun.set()
                yield piece
        finally:
            choice.begun.set()
        if request.finish_reason == "cancelled":
            raise ApiError(503, "this server is ending, and did not finish the answer")

    def _time(self, before: float | None) -> float:
        """Tell the metrics that a piece came, after one that came `before`; when it did."""
        now = time.perf_counter()
        if before is None:
            self._desk.metrics.time_first(now - self._start)
        else:
            self._desk.metrics.time_next(now - before)
        return now

    async def _forward(self, index: int, mailbox: _Mailbox) -> None:
        try:
            async for piece in self._read(self._choices[index]):
                mailbox.put_nowait((index, piece))
        except Exception as error:  # whatever it is, `told` raises it
            mailbox.put_nowait(error)
        mailbox.put_nowait(None)


class _Choice:
    """One answer. `first`: of the same prompt, if this one is not; `begun` once it is told."""

    def __init__(self, prompt: Prompt, options: dict[str, Any], first: "_Choice | None") -> None:
        self.prompt, self.options, self.first = prompt, options, first
        self.request: Asked | None = None
        self.begun = asyncio.Event()

    @property
    def usage(self) -> Usage:
        return Usage() if self.request is None else self.request.usage
