"""Options that several commands have."""

import argparse
import math


def add_kv_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kv-memory",
        type=_bytes_of_gigabytes,
        metavar="GB",
        help="of keys and values (default: what the context needs)",
    )


def _bytes_of_gigabytes(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected gigabytes above 0, found {text!r}")
    return int(number * 1e9)
