"""`serve`: the runtime's own, for artifacts and for models."""

import argparse

from ..runtime.cli import serve
from ..runtime.cli.main import Commands
from .compiled import take_models


def add_serve(commands: Commands) -> None:
    take_models(serve.add_serve(commands), "Serve a compiled model.", _serve)


def _serve(arguments: argparse.Namespace) -> None:
    arguments.name = arguments.name or serve.name_of(arguments.model)
    serve.serve_artifact(arguments)
