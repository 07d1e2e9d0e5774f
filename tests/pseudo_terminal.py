"""A process at a terminal, and the person who sits there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

PATIENCE_SECONDS = 60.0
SETTLING_SECONDS = 0.5
CTRL_C, CTRL_D = "\x03", "\x04"


class PseudoTerminal:
    """`seen`: all that was shown so far, without what returns the cursor and asks for brackets.
    stdout may lead elsewhere; env: None for a variable that is not set."""

    def __init__(
        self,
        command: Sequence[object],
        *,
        stdout: int | None = None,
        env: Mapping[str, str | None] | None = None,
    ) -> None:
        variables = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", **(env or {})}
        self._fd, end = pty.openpty()
        self._shown, self.seen, self._position = b"", "", 0
        self.brackets_pastes = False  # if it was told to
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=end,
            stdout=end if stdout is None else stdout,
            stderr=end,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(end, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
            env={name: value for name, value in variables.items() if value is not None},
        )
        os.close(end)

    def send(self, text: str | bytes) -> None:
        os.write(self._fd, text if isinstance(text, bytes) else text.encode())

    def wait_for(self, text: str) -> str:
        """What was shown since the last wait, up to and with `text`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.seen[self._position :]:
            assert time.monotonic() < deadline and self._read(), f"{text!r} not in {self.seen!r}"
        start = self._position
        self._position = self.seen.index(text, start) + len(text)
        return self.seen[start : self._position]

    def interrupt(self) -> None:
        """Ctrl-C at a prompt. Python sees a signal while it waits for input, but one that comes
        just before only with the next input: nobody is as quick as a test."""
        time.sleep(SETTLING_SECONDS)
        self.send(CTRL_C)

    def ask(self, line: str, until: str = "> ") -> str:
        """What is shown after a line, up to the next prompt."""
        self.send(f"{line}\r")
        self.wait_for(line)  # as the terminal echoes it
        return self.wait_for(until)

    def end(self) -> int:
        """Wait for the end of the process; its status."""
        while self._read():
            pass
        os.close(self._fd)
        return self.process.wait(PATIENCE_SECONDS)

    def _read(self) -> bool:
        """More of what is shown; False where the process has left the terminal."""
        if not select.select([self._fd], [], [], PATIENCE_SECONDS)[0]:
            return False
        try:
            shown = os.read(self._fd, 1 << 16)
        except OSError:  # how Linux tells it
            return False
        self._shown += shown
        text = self._shown.decode(errors="ignore").replace(
            "\r", ""
        )  # a character may come in parts
        self.brackets_pastes = "\033[?2004h" in text
        self.seen = re.sub(r"\033\[\?2004[hl]", "", text)
        return bool(shown)
