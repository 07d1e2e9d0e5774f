"""Threads that do a compile's work beside the one that called it."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor


@contextlib.contextmanager
def worker_threads(count: int) -> Iterator[Executor]:
    """So many threads, for the block; what they have not begun when it fails, they do not begin.

    They are waited for, unless the block is interrupted: what LLVM, a download or a slow disk is at
    takes from seconds to minutes, and whoever gave up does not want it.
    """
    pool, wait = ThreadPoolExecutor(count), True
    try:
        yield pool
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)
