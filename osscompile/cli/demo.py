"""`demo`: compile the shipped model and ask it a question."""

import argparse

from .. import targets
from ..runtime.cli.main import Commands
from ..runtime.cli.view import View
from ..runtime.model import load
from .ended import ended_like_interrupted

QUESTION = "What is 17 + 25?"


def add_demo(commands: Commands) -> None:
    command = commands.add_parser("demo", help="compile the shipped model and ask it a question")
    command.add_argument("-o", "--output", metavar="OUT", default="nano.osc")
    command.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from ..compiler import compile

    print("nano, a tiny gpt-oss that ships with osscompile, is compiled for this machine.")
    here = targets.of_this_machine()
    with ended_like_interrupted():
        output = compile(
            "nano",
            here.name,
            arguments.output,
            variants=[here.variant],
            context=4096,
            progress=True,
        )
    model = load(output)
    print(f"\n> {QUESTION}")
    View(model.context).show(model.chat([{"role": "user", "content": QUESTION}]), [])
    print(
        f"\nChat with it: osscompile run {output}    With the real one: osscompile run "
        "openai/gpt-oss-20b"
    )
