"""An artifact for a command that runs one: given, taken from the cache, or compiled into it."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import AbsentError, CompileError
from ..options import shown
from ..runtime.cli.main import CommandParser
from ..runtime.errors import ArtifactError
from ..runtime.manifest import MANIFEST
from .compile import add_adapter, add_options_of_compile
from .ended import ended_like_interrupted

ARTIFACT_SUFFIX = ".osc"  # what has it is no id of Hugging Face, which is not asked for it


def take_models(
    command: CommandParser, what: str, run: Callable[[argparse.Namespace], None]
) -> None:
    """Let a command of the runtime, which does `what` with an artifact, take a model as well. `run`
    finds what was named as `model` of its arguments."""
    command.description = (
        f"{what} OUT is an artifact, or a model as `osscompile compile` takes "
        "it, which is compiled once for this machine into a cache: see `osscompile list`."
    )
    add_options_of_compile(command)
    add_adapter(command)
    command.set_defaults(command=lambda arguments: _run_compiled(arguments, run))


def _run_compiled(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> None:
    given = arguments.artifact
    compiled = _find_compiled(given)
    for option in ("target", "profile", "adapter"):
        if compiled is not None and getattr(arguments, option) not in (None, []):
            raise CompileError(
                f"--{option}: expected a model to compile, found {given}, which is compiled; leave "
                "the option away, or name the model"
            )
    arguments.artifact, arguments.model = str(compiled or _compile(arguments)), given
    try:
        run(arguments)
    except ArtifactError as error:
        if os.path.exists(os.path.join(given, MANIFEST)):
            raise
        raise ArtifactError(
            f"{error}; it is in the cache: `osscompile rm` removes it, and `run` compiles it again"
        ) from error


def _find_compiled(given: str) -> Path | None:
    """An artifact's folder, or that of the entry of the cache that has this very name."""
    if os.path.exists(os.path.join(given, MANIFEST)):
        return Path(given)
    if os.path.exists(given):
        return None
    from ..cache.entries import list_entries

    return next((e.artifact for e in list_entries() if e.name == given and e.is_whole()), None)


def _compile(arguments: argparse.Namespace) -> Path:
    from ..cache.compile_once import compile_once

    given = arguments.artifact
    profile = "fast" if arguments.profile is None else arguments.profile
    missing = given.endswith(ARTIFACT_SUFFIX) and not os.path.exists(given)
    try:
        if missing:
            raise AbsentError(f"there is no {shown(given)}")
        with ended_like_interrupted():
            return compile_once(given, arguments.target, profile, arguments.adapter)
    except AbsentError as error:
        if not missing and _names_model(given):
            raise
        raise AbsentError(
            f"{shown(given)}: expected an artifact or a model, found neither: {error}; to make an "
            "artifact: osscompile compile MODEL -o OUT"
        ) from error


def _names_model(given: str) -> bool:
    from ..importer.resolve import find_model

    try:
        find_model(given)
    except AbsentError:
        return False
    return True
