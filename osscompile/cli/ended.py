"""Commands that leave nothing half made when they are told to end."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # of who stops a service, and of a closed terminal


@contextlib.contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """In the block these signals raise KeyboardInterrupt, as Ctrl-C does, so that what was begun is
    removed. A signal that is ignored, as under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():  # handlers are not its own
        yield
        return
    former = {number: signal.getsignal(number) for number in SIGNALS}
    changed = [number for number in SIGNALS if former[number] == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, former[number])
