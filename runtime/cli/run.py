"""`run`: chat with a compiled model."""

import argparse
from pathlib import Path

from ..artifact import ALWAYS_HASHED_BYTES, read_manifest
from ..engine import Model, load
from .chat import Messages, answer, converse
from .main import Commands
from .options import add_kv_memory
from .terminal import say_stage


def add_run(commands: Commands) -> argparse.ArgumentParser:
    command = commands.add_parser("run", help="chat with a compiled model")
    command.add_argument("artifact", metavar="OUT")
    command.add_argument("prompt", nargs="?", help="without it, a chat begins")
    command.add_argument("--reasoning", default="medium", metavar="low|medium|high")
    command.add_argument("--hide-analysis", action="store_true", help="show answers only")
    command.add_argument("--system", metavar="TEXT", help="instructions for the model")
    command.add_argument("--context", type=int, metavar="N", help="most positions")
    add_kv_memory(command)
    command.add_argument("--max-tokens", type=int, metavar="N")
    command.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--min-p", type=float, default=0.0)
    command.add_argument("--seed", type=int)
    command.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    command.set_defaults(command=_run)
    return command


def _run(arguments: argparse.Namespace) -> None:
    model = _load(arguments)
    names = ("reasoning", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    messages: Messages = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    if arguments.prompt is None:
        converse(model, messages, arguments.hide_analysis, options)
        return
    messages.append({"role": "user", "content": arguments.prompt})
    answer(model, messages, arguments.hide_analysis, options)


def _load(arguments: argparse.Namespace) -> Model:
    """Load, and tell how far the hashing of a large new copy is, which takes seconds a gigabyte."""
    files = read_manifest(Path(arguments.artifact)).files
    total = sum(file.num_bytes for file in files.values())
    hashed = 0

    def progress(num_bytes: int) -> None:
        nonlocal hashed
        hashed += num_bytes
        say_stage(f"verifying {hashed / 1e9:.1f} of {total / 1e9:.1f} GB")

    model = load(
        arguments.artifact,
        context=arguments.context,
        kv_memory=arguments.kv_memory,
        threads=arguments.threads,
        progress=progress if total > ALWAYS_HASHED_BYTES else None,
    )
    if hashed:
        say_stage("")
    return model
