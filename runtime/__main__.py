"""`python -m osscompile_runtime run | serve | inspect | bench OUT`, where the runtime alone is."""

import argparse

from .cli.bench import add_bench
from .cli.inspect import add_inspect
from .cli.main import CommandParser, Parser, end_process, run_command
from .cli.run import add_run
from .cli.serve import add_serve
from .version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {__package__}", description="Run compiled gpt-oss models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for add in (add_run, add_serve, add_inspect, add_bench):
        add(commands)
    return parser


if __name__ == "__main__":
    end_process(run_command(_parser()))
