"""Begin a command: what it needs takes half a second to import, in which an interrupt is answered
too. This file imports nothing that takes time."""

import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # the status that shells give to what Ctrl-C ended


def run_script(prog: str, main: Callable[[], int]) -> NoReturn:
    """End the process with the status that `main`, which imports what it needs, returns."""
    try:
        status = main()
        from .cli.main import end_process
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    end_process(status)
