"""A process that runs cells of Python, one after the other, each for a limited time."""

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PIPE_BYTES = 1 << 20  # at most what a pipe holds
WORD_BYTES = 16  # half of the letters of a word that says that a cell is done
PART = 1 << 16  # bytes that are read or written at once


class Interpreter:
    """The program of `interpreter.py` in a process group of its own, started by a command, which
    gets the descriptors `inherited`. `home`: what it knows `folder` as; `limits`, `user`: see
    there. All methods are for one thread at a time."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        home: str,
        limits: Mapping[str, int],
        user: int | None,
        inherited: Sequence[int],
    ) -> None:
        program = Path(__file__).with_name("interpreter.py").read_text("utf-8")
        self._killed = threading.Event()
        self._done, done = os.pipe()
        self._ready = secrets.token_hex(WORD_BYTES)
        given = map(json.dumps, (done, self._ready, limits, user))
        arguments = [*command, "-I", "-c", program, *given]
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": home,
            "TMPDIR": home,
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",  # each takes address space, which is limited
        }

        def start() -> None:
            self._process = subprocess.Popen(
                arguments,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[done, *inherited],
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

        try:
            _in_lasting_thread(start, self._killed)
        except BaseException:
            os.close(self._done)
            raise
        finally:
            os.close(done)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._cells, self._told = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._cells, self._told, self._done):
            os.set_blocking(descriptor, False)

    def start(self, seconds: float) -> tuple[str, str]:
        """Wait until it can run cells; see `run`."""
        return self._wait(seconds, PIPE_BYTES, b"", self._ready)

    def run(self, code: str, seconds: float, most: int) -> tuple[str, str]:
        """Run a cell: the first `most` bytes of its output, and how the interpreter ended if it is
        not done."""
        word = secrets.token_hex(WORD_BYTES)
        return self._wait(seconds, most, json.dumps([word, code]).encode() + b"\n", word)

    def _wait(self, seconds: float, most: int, unsent: bytes, word: str) -> tuple[str, str]:
        limit = time.monotonic() + seconds
        output, ended = _Output(most), ""
        with selectors.DefaultSelector() as selector:
            selector.register(self._told, selectors.EVENT_READ)
            selector.register(self._done, selectors.EVENT_READ)
            if unsent:
                selector.register(self._cells, selectors.EVENT_WRITE)
            is_done, words = False, b""
            while not is_done and not ended:
                ready = [key.fd for key, _ in selector.select(max(0.0, limit - time.monotonic()))]
                if time.monotonic() >= limit:
                    ended = f"stopped after {seconds:g} seconds"
                if self._cells in ready:
                    unsent = unsent[_write(self._cells, unsent) :]
                    if not unsent:
                        selector.unregister(self._cells)
                if self._told in ready and not output.take(self._told):
                    selector.unregister(self._told)
                if self._done in ready:
                    some = os.read(self._done, PART)
                    words = words[-2 * WORD_BYTES :] + some
                    is_done = word.encode() in words  # a cell may have written others
                    ended = "" if is_done else ended if some else "the interpreter ended"
        # What it wrote before it was done; more may come for ever.
        limit_bytes = output.num_bytes + PIPE_BYTES
        while output.num_bytes < limit_bytes and output.take(self._told):
            pass
        return output.text(), ended

    def kill(self) -> None:
        """End the process and those that it started. Call it once, also when it has ended: until
        then nobody else gets its number."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._killed.set()
        for descriptor in (self._process.stdin, self._process.stdout):
            assert descriptor is not None
            descriptor.close()
        os.close(self._done)


class _Output:
    """The first `most` bytes of what a process says."""

    def __init__(self, most: int) -> None:
        self._most, self._kept = most, bytearray()
        self.num_bytes = 0

    def take(self, descriptor: int) -> bool:
        """Whether there was something."""
        try:
            some = os.read(descriptor, PART)
        except BlockingIOError:
            return False
        self.num_bytes += len(some)
        self._kept += some[: max(0, self._most - len(self._kept))]
        return bool(some)

    def text(self) -> str:
        text = self._kept.decode(errors="replace").rstrip("\n")
        if self.num_bytes > self._most:
            text += f"\n[cut: the first {self._most} of {self.num_bytes} bytes or more]"
        return text


def _write(descriptor: int, content: bytes) -> int:
    """How many bytes were taken; all if nobody reads any more, which is noticed elsewhere."""
    try:
        return os.write(descriptor, content[:PART])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(content)


def _in_lasting_thread(start: Callable[[], None], end: threading.Event) -> None:
    """Start a process in a thread that lasts until `end`: bubblewrap ends what it runs when the
    thread that started it ends. Raises what `start` raises."""
    started = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            start()
        except BaseException as error:  # raised where it is waited for
            errors.append(error)
            end.set()
        started.set()
        end.wait()

    threading.Thread(target=run, name="osscompile sandbox", daemon=True).start()
    started.wait()
    if errors:
        raise errors[0]
