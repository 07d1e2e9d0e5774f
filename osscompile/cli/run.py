"""`run`: the runtime's own, for artifacts and for models."""

from ..runtime.cli import run
from ..runtime.cli.main import Commands
from .compiled import take_models


def add_run(commands: Commands) -> None:
    take_models(run.add_run(commands), "Chat with a compiled model.", run.run_artifact)
