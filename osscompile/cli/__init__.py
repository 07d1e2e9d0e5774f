"""The command line: a file a command, here in the order in which people meet them."""

import argparse
from collections.abc import Sequence

from ..runtime.cli.inspect import add_inspect
from ..runtime.cli.main import CommandParser, Parser, run_command
from ..runtime.version import __version__
from .bench import add_bench
from .bundle import add_bundle
from .compile import add_compile
from .demo import add_demo
from .list import add_list
from .measure_fidelity import add_measure_fidelity
from .rm import add_rm
from .run import add_run
from .serve import add_serve
from .targets import add_targets
from .tune import add_tune

COMMANDS = (
    add_compile,
    add_run,
    add_serve,
    add_list,
    add_rm,
    add_inspect,
    add_targets,
    add_bench,
    add_measure_fidelity,
    add_tune,
    add_bundle,
    add_demo,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its status: see `run_command`."""
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="osscompile", description="Compile gpt-oss models for one machine, and run them."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for add in COMMANDS:
        add(commands)
    return parser
