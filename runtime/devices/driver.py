"""The thread that drives the devices of this process.

TVM's threads belong to the thread that calls a kernel, and so does the context of a GPU. One thread
of ours, which all models share, does what callers of any thread ask for, one after the other. A
signal interrupts the caller only, never what changes a device's memory.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from ..errors import OsscompileError

T = TypeVar("T")

SIGNAL_SECONDS = 0.5  # a signal that comes just before Python waits is seen when it wakes


class Abandoned(BaseException):
    """Nobody waits for this work any more; no `except Exception` takes it for an error."""


class DriverEnded(OsscompileError):
    """The process ends, and the thread that computes has ended before it."""

    def __init__(self) -> None:
        super().__init__(
            "model: expected a call before the end of the process, found one from an exit handler "
            "or a finalizer that runs after what computes has ended; make it before that, or "
            "register the handler after the first model is loaded"
        )


class Driver:
    """A thread that does one work at a time, in the order in which it was asked to."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._works: SimpleQueue[_Work | None] = SimpleQueue()
        self._current: _Work | None = None
        self._stopping = False
        # What is asked for after this is refused. No lock keeps the two apart, because an interrupt
        # could leave it locked, and every caller would wait for ever.
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="osscompile driver", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises on the driver's thread.

        An interrupted caller waits until the kernel in flight has ended; what would follow is left
        out (see `check`). Raises OsscompileError in a process that was forked since, for a call
        from within another, and at the end of the process.
        """
        if os.getpid() != self._process:
            raise OsscompileError(
                "model: expected the process that loaded it, found a fork of that, which has none "
                "of its threads; load the model in the new process"
            )
        if threading.get_ident() == self._thread.ident:  # a finalizer's; it would wait for itself
            raise OsscompileError(
                "model: expected a call that no other call makes, found one from within a call of "
                "a model; make it when that has ended"
            )
        work = _Work(function)
        del function  # only the work has it, and whoever asked
        try:
            self._ask(work)
            while not work.ended.acquire(timeout=SIGNAL_SECONDS):
                pass
        except BaseException:  # whatever a signal's handler raises, before or after the `put`
            work.abandoned = True
            rest = _Work(_do_nothing)
            self._ask(rest)
            rest.ended.acquire()
            raise
        try:
            if work.error is not None:
                raise work.error
            return work.result  # type: ignore[no-any-return]
        finally:
            del work  # whose error knows this frame

    def check(self) -> None:
        """Raise Abandoned, between two kernels, if the caller does not wait for them any more."""
        if self._stopping or (self._current is not None and self._current.abandoned):
            raise Abandoned

    def _ask(self, work: "_Work") -> None:
        self._works.put(work)
        if self._ended:  # whoever comes later than the thread's own look does it instead
            self._refuse_rest()

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            self._current = work
            work.do()
            self._current = work = None
        self._ended = True
        self._refuse_rest()

    def _refuse_rest(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                if (work := self._works.get_nowait()) is not None:
                    work.refuse()

    def _stop(self) -> None:
        """At the end of the process: a thread that Python ends inside a kernel may crash."""
        if os.getpid() == self._process:
            self._stopping = True
            self._works.put(None)
            self._thread.join()


class _Work:
    """What a caller asked for and, once it ended, what came of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function: Callable[[], Any] | None = function
        self.abandoned = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = threading.Lock()
        self.ended.acquire()

    def do(self) -> None:
        try:
            if not self.abandoned and self._function is not None:
                self.result = self._function()
        except BaseException as error:  # the caller raises it
            self.error = error
        self._function = None  # a model that its caller drops now is gone at once
        self.ended.release()

    def refuse(self) -> None:
        """It came too late. Each work is done or refused, and only once."""
        self.error = DriverEnded()
        self._function = None
        self.ended.release()


def driver() -> Driver:
    """The one of this process. Raises OsscompileError where no thread can begin any more."""
    if sys.is_finalizing():
        raise DriverEnded
    process = os.getpid()
    if process not in _drivers:
        with _starting:
            if process not in _drivers:
                _drivers[process] = Driver()
    return _drivers[process]


def forbid_fork() -> None:
    """Drivers of GPUs do not outlive a fork. Raises OsscompileError in a process that was forked
    from one which used such a device; to be called before one is opened."""
    used = _devices_of or [os.getpid()]
    if used[0] != os.getpid():
        raise OsscompileError(
            "device: expected a process of its own, found a fork of one that uses a device, whose "
            "driver does not work in both; start processes by multiprocessing's method `spawn`"
        )
    _devices_of[:] = used


def _do_nothing() -> None:
    """What is asked for to hear that all before has ended."""


_drivers: dict[int, Driver] = {}  # by process: a fork inherits a driver, but not its thread
_devices_of: list[int] = []  # the process that opened a device other than the CPU
_starting = threading.Lock()
if hasattr(os, "register_at_fork"):  # a fork must not inherit it locked
    os.register_at_fork(
        before=_starting.acquire,
        after_in_parent=_starting.release,
        after_in_child=_starting.release,
    )
