"""`targets`: list the machines that can be compiled for."""

import argparse

from .. import targets
from ..runtime.cli.main import Commands
from ..runtime.cli.terminal import print_table


def add_targets(commands: Commands) -> None:
    command = commands.add_parser("targets", help="list the machines that can be compiled for")
    command.set_defaults(command=_targets)


def _targets(arguments: argparse.Namespace) -> None:
    rows = [("target", "machine; what was run of its variants, best first")]
    for name in targets.names():
        variants = targets.load_variants(name)
        rows.append((name, variants[0].description))
        rows += [(f"  {v.variant}", v.checked) for v in variants]
    print_table(rows)
