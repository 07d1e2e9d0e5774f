"""What a model and its adapters are, and in which state: known without reading any weights."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..importer.forms import original
from ..importer.forms.gguf import split_files
from ..importer.forms.shards import read_index
from ..importer.generation import GENERATION, TOKENIZER_CONFIG
from ..importer.resolve import Found, find_adapter, find_model, find_revision
from ..runtime.manifest import CHAT_TEMPLATE, TOKENIZER

SUFFIXES = (".json", ".jinja", ".safetensors", ".gguf")  # of what a checkpoint is read from
SHARED_FILES = (TOKENIZER, TOKENIZER_CONFIG, GENERATION, CHAT_TEMPLATE)  # of OpenAI's form, one up


@dataclass(frozen=True)
class Origin:
    """What an artifact is compiled of. `model` and `adapters` name it, in the same words from
    every working folder; `name` is for people. `state` changes with what is there: names, sizes and
    times of files, Hugging Face's commit, Ollama's digest. None: only Hugging Face knows it."""

    name: str
    model: str
    adapters: tuple[str, ...]
    state: str | None


def find_origin(model: str, adapters: Sequence[str] = (), online: bool = False) -> Origin:
    """Find what the user names. No network is needed, unless `online`, to ask for newest commits.

    Raises AbsentError for what is not there or cannot be asked for, CheckpointError for files that
    cannot be looked at.
    """
    found = find_model(model)
    places = [find_adapter(adapter) for adapter in adapters]
    states = [_state(place, online) for place in (found, *places)]
    return Origin(
        found.name,
        _plain_name(model, found),
        tuple(map(_plain_name, adapters, places)),
        None if None in states else hashlib.sha256(json.dumps(states).encode()).hexdigest(),
    )


def is_named(plain: str, given: str) -> bool:
    """Whether a user who says `given` means what Origin calls `plain`, which may be gone."""
    try:
        return plain in (given, os.path.realpath(os.path.expanduser(given)))
    except ValueError:  # a zero byte
        return False


def _plain_name(given: str, found: Found) -> str:
    path = os.path.expanduser(given)
    return os.path.realpath(path) if found.path == Path(path) else given


def _state(found: Found, online: bool) -> object:
    if found.digest is not None:
        return found.digest
    if found.repo_id is not None:
        return find_revision(found.repo_id, online)
    return _state_of_files(found.path) if found.path is not None else "made from a seed"


def _state_of_files(path: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change of every file: cheap, and sure enough."""
    path = Path(os.path.realpath(path))
    try:
        if path.is_dir():
            files = {file for file in path.iterdir() if file.suffix in SUFFIXES}
            files |= set((read_index(path) or {}).values())
            if original.recognises(path):
                files |= {path.parent / name for name in SHARED_FILES}
        else:
            files = set(split_files(path))
        known = [(str(file), file.stat()) for file in sorted(files) if file.is_file()]
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected files that can be looked at, found: {error}; check their permissions"
        ) from error
    return [(name, status.st_size, status.st_mtime_ns) for name, status in known]
