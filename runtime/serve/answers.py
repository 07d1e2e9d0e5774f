"""The answers that one request waits for: asked of the engine, read together, and cancelled when
their reader goes away."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

from ..usage import Usage
from .errors import ApiError
from .gate import Gate
from .metrics import Metrics

LONG_BODY = 16 << 10  # bytes of a request that takes longer than a millisecond to tokenise

T = TypeVar("T")
Work = ParamSpec("Work")
Prompt: TypeAlias = Sequence[int] | Sequence[Mapping[str, object]]
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

    async def ask(self, questions: Sequence[tuple[Prompt, dict[str, Any]]], size: int) -> "Answers":
        """Prompts with the options of `Engine.submit`, from a body of `size` bytes. Raises ApiError
        without room for them, InputError for bad ones."""
        start = time.perf_counter()
        self.gate.enter(len(questions))
        asked: list[Asked] = []
        try:
            for prompt, options in questions:
                asked.append(await beside(size, self.engine.submit, prompt, **options))
        except BaseException:
            for request in asked:
                request.cancel()
            self.gate.leave(len(questions), 0.0)
            raise
        answers = Answers(self, asked, start)
        self._open.add(answers)
        return answers

    def leave(self, answers: "Answers", count: int, seconds: float) -> None:
        """They have ended, so many after so long."""
        self._open.discard(answers)
        self.gate.leave(count, seconds)

    def cancel(self) -> None:
        """Whoever still waits is told that this server ends."""
        for answers in self._open:
            answers.cancel()


async def beside(
    size: int, work: Callable[Work, T], *arguments: Work.args, **options: Work.kwargs
) -> T:
    """Do work on a body of `size` bytes; if it is long, beside the event loop, so that others are
    told their tokens meanwhile."""
    if size < LONG_BODY:
        return work(*arguments, **options)
    return await asyncio.to_thread(work, *arguments, **options)


class Answers:
    """Of one HTTP request, which must `close` them: only then is their room free."""

    def __init__(self, desk: Desk, asked: Sequence[Asked], start: float) -> None:
        self._desk, self._asked, self._start = desk, asked, start
        self._is_open = True

    @property
    def usage(self) -> Usage:
        """What all of them took; their prompts, if there are several, each counted."""
        told = [request.usage for request in self._asked]
        return Usage(*(sum(getattr(u, f.name) for u in told) for f in fields(Usage)))

    async def told(self) -> AsyncIterator[tuple[int, Any]]:
        """Which answer, and what it tells, as it is told. Raises what ended one of them."""
        if len(self._asked) == 1:
            async with contextlib.aclosing(self._read(0)) as told:
                async for piece in told:
                    yield 0, piece
            return
        mailbox: _Mailbox = asyncio.Queue()
        readers = [asyncio.create_task(self._forward(i, mailbox)) for i in range(len(self._asked))]
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
        for request in self._asked:
            request.cancel()

    def close(self) -> None:
        """Nobody reads them any more; a second call changes nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self.cancel()
        for request in self._asked:
            self._desk.metrics.count_tokens(request.usage)
        self._desk.leave(self, len(self._asked), time.perf_counter() - self._start)

    async def _read(self, index: int) -> AsyncGenerator[Any, None]:
        request, metrics = self._asked[index], self._desk.metrics
        before: float | None = None
        async for piece in request:
            now = time.perf_counter()
            if before is None:
                metrics.time_first(now - self._start)
            else:
                metrics.time_next(now - before)
            before = now
            yield piece
        if request.finish_reason == "cancelled":
            raise ApiError(503, "this server is ending, and did not finish the answer")

    async def _forward(self, index: int, mailbox: _Mailbox) -> None:
        try:
            async for piece in self._read(index):
                mailbox.put_nowait((index, piece))
        except Exception as error:  # whatever it is, `told` raises it
            mailbox.put_nowait(error)
        mailbox.put_nowait(None)
