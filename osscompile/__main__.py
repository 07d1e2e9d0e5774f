"""The command line, as `osscompile` and `python -m osscompile`."""

import sys
from typing import NoReturn


def script() -> NoReturn:
    try:  # imports and options take half a second, in which an interrupt is answered too
        from .cli import main
        from .runtime.cli.main import end_process

        status = main()
    except KeyboardInterrupt:
        print("\nosscompile: interrupted", file=sys.stderr)
        sys.exit(130)
    end_process(status)


if __name__ == "__main__":
    script()
