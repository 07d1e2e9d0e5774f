"""What an answer took: its tokens and how fast they came."""

import time

from ..usage import Usage

# An answer begins with `<|channel|>`, its name and `<|message|>`: they came before the first text.
HEADER_TOKENS = 3


class Pace:
    """A clock that runs from the question on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None  # when the first text came

    def take(self) -> None:
        """To be called as pieces come."""
        self._first = self._first or time.perf_counter()

    def describe(self, usage: Usage, reason: str) -> str:
        """Two lines. Speeds are of tokens that were computed, and of those after the first text."""
        first = self._first or time.perf_counter()
        num_later = usage.completion_tokens - HEADER_TOKENS - 1
        seconds = time.perf_counter() - first
        step = seconds / num_later if num_later > 0 else 0.0
        reading = first - self._start - HEADER_TOKENS * step
        computed = usage.prompt_tokens - usage.cached_tokens
        return (
            f"prompt: {usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached"
            f"{_speed(computed, reading)}\n"
            f"answer: {usage.completion_tokens} tokens, {usage.reasoning_tokens} of them reasoning"
            f"{_speed(num_later, seconds)}; ended: {reason}"
        )


def _speed(num_tokens: int, seconds: float) -> str:
    return f", {num_tokens / seconds:,.1f} tok/s" if num_tokens > 0 and seconds > 0 else ""
