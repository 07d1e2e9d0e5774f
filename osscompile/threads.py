"""Threads that do a compile's work beside the one that called it."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from .errors import ThreadError

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def worker_threads(count: int) -> Iterator[Executor]:
    """So many threads, for the block; what they have not begun when it fails, they do not begin.

    They are waited for, unless the block is interrupted: what LLVM, a download or a slow disk is at
    takes from seconds to minutes, and whoever gave up does not want it. ThreadError where no
    thread can begin.
    """
    pool, wait = _Workers(count), True
    try:
        yield pool
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


class _Workers(ThreadPoolExecutor):
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            raise ThreadError(error) from error
