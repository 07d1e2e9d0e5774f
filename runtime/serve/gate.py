"""How many answers may be asked for at once, and when none are any more."""

import asyncio
import math

from .errors import ApiError

MAX_WAIT = 60  # seconds that a client is told to wait, at most
LATEST = 0.1  # how much the last answer counts in the mean of their times


class Gate:
    """Lets in as many answers as run and wait. It is used on the event loop alone."""

    def __init__(self, running: int, waiting: int) -> None:
        self._running, self._most = running, running + waiting
        self._seconds = 1.0  # that an answer took lately
        self._empty = asyncio.Event()
        self._empty.set()
        self.inside, self.ending = 0, False

    def enter(self, count: int) -> None:
        """Raises ApiError if there is no room, or the server ends."""
        if self.ending:
            raise ApiError(503, "this server is ending; ask it again later, or another")
        if count > self._most:
            raise ApiError(
                400,
                f"expected at most {self._most} answers at once, n for each prompt, found {count}",
            )
        if self.inside + count > self._most:
            wait = min(MAX_WAIT, math.ceil(self._seconds * self.inside / self._running))
            raise ApiError(
                429,
                f"queue: expected room for {count}, found {self.inside} of {self._most} places "
                f"taken; ask again in {wait} s",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self.inside += count
        self._empty.clear()

    def leave(self, count: int, seconds: float) -> None:
        """Answers that took so long have ended."""
        self._seconds += LATEST * (seconds - self._seconds)
        self.inside -= count
        if self.inside == 0:
            self._empty.set()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in any more; whether all have left within the time."""
        self.ending = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            return False
        return True
