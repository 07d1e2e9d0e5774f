"""`rm`: remove what `run` compiled into the cache."""

import argparse

from ..errors import CompileError
from ..runtime.cli.main import Commands


def add_rm(commands: Commands) -> None:
    command = commands.add_parser(
        "rm",
        help="remove models that `run` has compiled",
        description="Remove what `osscompile list` shows. What runs meanwhile goes on.",
    )
    command.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="one of the list, its beginning, or the model's, if that is only one's",
    )
    command.add_argument(
        "--stale", action="store_true", help="all that the list calls stale, which nothing runs"
    )
    command.set_defaults(command=_rm)


def _rm(arguments: argparse.Namespace) -> None:
    from ..cache.entries import choose_entry, list_entries, remove_entry, stale_entries

    if not arguments.names and not arguments.stale:
        raise CompileError("rm: expected a NAME of `osscompile list`, or --stale, found neither")
    chosen = [choose_entry(name) for name in arguments.names]
    chosen += stale_entries(list_entries()) if arguments.stale else []
    for entry in dict.fromkeys(chosen):
        size = entry.num_bytes()
        remove_entry(entry)
        print(f"removed {entry.name}, {size / 1e9:.2f} GB")
