"""A sign of life on a terminal while a model reads or reasons."""

import threading
import time

from .terminal import say_stage

SECONDS = 1.0  # before the first sign, so that quick answers do not flicker, and between two


class Waiting:
    """Says on one line of stderr what is waited for and since when, until `end`."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Clear the line before something else is printed."""
        self._ended.set()
        self._thread.join()

    def _say(self) -> None:
        is_said = False
        while not self._ended.wait(SECONDS):
            say_stage(f"{self.what}, {time.monotonic() - self._start:.0f} s")
            is_said = True
        if is_said:
            say_stage("")
