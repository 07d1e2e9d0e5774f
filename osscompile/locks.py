"""Locks between processes."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def only_holder(path: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Hold the lock that the file `path` stands for; the file goes when the block ends.

    While another process holds it, `busy` is called, which may raise, and the lock is waited for.
    It goes with its process, whatever ends that.
    """
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_open_at(lock, path):
                continue  # its holder removed it after we opened it: another may hold a new one
            try:
                yield
                return
            finally:
                path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether another process holds the lock now."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file: nobody does
        return False
    return False


def _is_open_at(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
