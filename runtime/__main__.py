"""`python -m osscompile_runtime run | inspect OUT`, where the runtime alone is."""

import argparse
import sys

from .cli.inspect import add_inspect
from .cli.main import run_command
from .cli.run import add_run


def _parser() -> argparse.ArgumentParser:
    package = __package__ or ""
    parser = argparse.ArgumentParser(prog=package, description="Run compiled gpt-oss models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_run, add_inspect):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(_parser()))
