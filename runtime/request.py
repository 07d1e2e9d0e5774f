"""What a caller of the engine holds: an answer that is told while it is computed."""

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Generic, TypeVar

from .errors import OsscompileError
from .scheduler import Answer
from .usage import Usage

Told = TypeVar("Told")


def check_process(process: int) -> None:
    """Raises OsscompileError in another process than the engine's, for which nobody computes."""
    if os.getpid() != process:
        raise OsscompileError(
            "engine: expected the process that made it, found a fork of that, which has none of "
            "its threads; make an engine in the new process"
        )


class Mailbox(Generic[Told]):
    """What was told and not yet read. Any thread writes, and any reads."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self.usage = Usage()
        self.finish_reason: str | None = None
        self._told: deque[Told] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._waiters: list[Callable[[], object]] = []  # of event loops

    def put(self, told: Sequence[Told], usage: Usage) -> None:
        with self._changed:
            self.usage = usage
            self._told.extend(told)
            self._notify()

    def close(self, reason: str, error: BaseException | None) -> None:
        """Nothing more comes; the first call counts."""
        with self._changed:
            if not self._ended:
                self._ended, self.finish_reason, self._error = True, reason, error
            self._notify()

    def read(self) -> Iterator[Told]:
        """Until it is closed; raises the error that ended it."""
        check_process(self._process)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._told or self._ended)
                if not self._told:
                    break
                told = self._told.popleft()
            yield told
        if self._error is not None:
            raise self._error

    async def read_async(self) -> AsyncIterator[Told]:
        """As `read`, without keeping the event loop from other work."""
        check_process(self._process)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody reads
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._waiters.append(wake)
        try:
            while True:
                changed.clear()
                ended = self._ended  # before the last is read, which was put before
                while self._told:
                    yield self._told.popleft()
                if ended:
                    break
                await changed.wait()
        finally:
            with self._changed:
                self._waiters.remove(wake)
        if self._error is not None:
            raise self._error

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._waiters:
            wake()


class Request(Generic[Told]):
    """An answer that an engine computes. `for` or `async for` gives what is told as it is told;
    what was told before comes at once. A request that nobody holds any more is cancelled."""

    def __init__(self, mailbox: Mailbox[Told], answer: Answer) -> None:
        self._mailbox, self._answer = mailbox, answer

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        return self._mailbox.usage

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed; known when the first is told."""
        return self.usage.cached_tokens

    @property
    def finish_reason(self) -> str | None:
        """None until it has ended; then stop, length, tool_calls, cancelled or error."""
        return self._mailbox.finish_reason

    def cancel(self) -> None:
        """End it; its pages are free after the step that is under way."""
        self._answer.cancelled = True

    def __iter__(self) -> Iterator[Told]:
        yield from self._mailbox.read()

    async def __aiter__(self) -> AsyncIterator[Told]:
        async for told in self._mailbox.read_async():
            yield told

    def __del__(self) -> None:
        self.cancel()
