"""`measure-fidelity`: compare an artifact with its checkpoint."""

import argparse

from ..runtime.cli.main import Commands
from ..runtime.cli.terminal import print_table
from ..runtime.fidelity import fidelity_rows
from .compile import add_model
from .ended import ended_like_interrupted


def add_measure_fidelity(commands: Commands) -> None:
    command = commands.add_parser(
        "measure-fidelity", help="compare an artifact that runs here with its checkpoint"
    )
    command.add_argument("artifact", metavar="OUT")
    add_model(command)
    command.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help="of the text, at most (default: 2048)"
    )
    command.set_defaults(command=_measure)


def _measure(arguments: argparse.Namespace) -> None:
    from ..fidelity import measure_fidelity  # TVM takes seconds to import

    with ended_like_interrupted():
        fidelity = measure_fidelity(
            arguments.artifact,
            arguments.model,
            adapters=arguments.adapter,
            num_tokens=arguments.tokens,
            progress=True,
        )
    print_table(fidelity_rows(fidelity))
    print(f"\nkept in {arguments.artifact}, for `osscompile inspect {arguments.artifact}`")
