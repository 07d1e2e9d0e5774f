"""The options of a far machine, of `bench` and `tune`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..remote import Remote


def add_remote(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rpc", metavar="HOST:PORT", help="measure on a server that this tracker of TVM's knows"
    )
    command.add_argument("--key", metavar="K", help="of the server, for --rpc")


def chosen_remote(arguments: argparse.Namespace) -> "Remote | None":
    from ..remote import parse_remote

    return parse_remote(arguments.rpc, arguments.key)
