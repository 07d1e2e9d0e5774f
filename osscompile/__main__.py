"""The command line, as `osscompile` and `python -m osscompile`."""

from typing import NoReturn

from .runtime.script import run_script


def script() -> NoReturn:
    run_script("osscompile", _main)


def _main() -> int:
    from .cli import main

    return main()


if __name__ == "__main__":
    script()
