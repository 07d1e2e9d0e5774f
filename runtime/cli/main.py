"""Run a command line: errors of ours become one message, and a status."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TypeAlias

from ..errors import OsscompileError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; 0, or 1 after an error of ours, which goes to stderr as
    one message."""
    arguments = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except OsscompileError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
