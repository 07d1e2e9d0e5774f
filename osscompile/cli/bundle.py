"""`bundle`: copy the runtime alone into a directory."""

import argparse
from pathlib import Path

from ..runtime.cli.main import Commands


def add_bundle(commands: Commands) -> None:
    command = commands.add_parser("bundle", help="copy the runtime alone into a directory")
    command.add_argument("directory", metavar="DIR")
    command.set_defaults(command=_bundle)


def _bundle(arguments: argparse.Namespace) -> None:
    from ..bundle import bundle_runtime

    folder = bundle_runtime(Path(arguments.directory))
    print(f"wrote {folder}; beside it, `import {folder.name}` needs what its README.txt says")
