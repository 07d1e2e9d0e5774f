"""The command line, as `osscompile` and `python -m osscompile`."""

import sys
from typing import NoReturn


def script() -> NoReturn:
    try:  # the imports take half a second, in which an interrupt is answered too
        from .cli import main
        from .runtime.cli.main import end_process
    except KeyboardInterrupt:
        print("\nosscompile: interrupted", file=sys.stderr)
        sys.exit(130)
    end_process(main())


if __name__ == "__main__":
    script()
