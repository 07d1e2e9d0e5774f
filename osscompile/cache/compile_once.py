"""Compile a model for this machine, unless the cache has it."""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import AbsentError, CompileError, PlaceError
from ..here import target_here
from ..options import shown
from ..runtime.trials.files import write_json
from ..targets import Target
from .entries import CACHE, FACTS, Entry, cache_folder, last_entry, list_entries, stale_entries
from .facts import facts_of
from .origin import find_origin


def compile_once(
    model: str, target: str | None = None, profile: str = "fast", adapters: Sequence[str] = ()
) -> Path:
    """The artifact of a model for this machine, out of the cache or compiled into it.

    `target`: see `target_here`; the others as for `compile`. What is compiled already is found
    without the network; before a compile, Hugging Face is asked for the newest commit. Of a model
    that is gone or cannot be asked for, the last artifact is taken, with a warning. What another
    process compiles is waited for. Raises TargetError, CompileError, CheckpointError, AbsentError.
    """
    machine = target_here(target)
    request = machine.name, machine.variant, profile
    try:
        entry = _compiled_entry(model, machine, profile, adapters)
    except AbsentError as error:
        known = last_entry(model, adapters, *request)
        if known is None:
            raise
        day = time.strftime("%Y-%m-%d", time.localtime(known.compiled()))
        warnings.warn(f"{error}; {known.name} is run, compiled on {day}", stacklevel=2)
        entry = known
    entry.mark_used()
    return entry.artifact


def _compiled_entry(model: str, machine: Target, profile: str, adapters: Sequence[str]) -> Entry:
    for online in (False, True):
        origin = find_origin(model, adapters, online)
        if origin.state is not None:
            facts = facts_of(origin, machine, profile)
            entry = Entry(cache_folder() / facts.entry_name(origin.name), facts)
            if entry.is_whole():
                return entry
        elif known := last_entry(model, adapters, machine.name, machine.variant, profile):
            if known.facts.model != model and os.path.isabs(known.facts.model):
                raise AbsentError(
                    f"{shown(model)}: expected {shown(known.facts.model)}, which it was compiled "
                    "of, found it gone; name its new place, if it was moved"
                )
            raise AbsentError(
                f"{shown(model)}: expected it in Hugging Face's cache, found nothing of it"
            )
    _compile(entry, model, machine, adapters)
    return entry


def _compile(entry: Entry, model: str, machine: Target, adapters: Sequence[str]) -> None:
    from ..compiler import compile  # TVM takes seconds to import: only where it is needed

    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        with entry.locked(lambda: _say(f"another process compiles {entry.name}: waiting for it")):
            if entry.is_whole():
                return
            try:
                entry.folder.mkdir(exist_ok=True)
                write_json(entry.folder / FACTS, asdict(entry.facts))
                compile(
                    model,
                    machine.name,
                    entry.artifact,
                    variants=machine.variant,
                    profile=entry.facts.profile,
                    adapters=adapters,
                    progress=True,
                )
            finally:
                if not entry.is_whole():
                    shutil.rmtree(entry.folder, ignore_errors=True)
    except PlaceError as error:
        raise CompileError(
            f"{error.problem}; remove what you do not need (`osscompile list`, `osscompile rm`), "
            f"or set {CACHE} to another folder"
        ) from error
    except OSError as error:
        raise CompileError(
            f"{entry.folder.parent}: expected a cache that can be written, found: {error}; set "
            f"{CACHE} to another folder"
        ) from error
    entry.mark_used()
    for old in stale_entries(list_entries()):
        if old.facts.request == entry.facts.request:
            _say(
                f"{old.name} ({old.num_bytes() / 1e9:.2f} GB) is of an older checkpoint or version:"
                " `osscompile rm --stale` removes it"
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
