"""Turn what the user names as a model into its weights, tokenizer and generation defaults."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..errors import AbsentError, CheckpointError
from ..options import shown
from ..runtime.errors import ArtifactError
from ..runtime.manifest import CHAT_TEMPLATE
from ..runtime.tokenizer import Tokenizer
from .checkpoint import Opened
from .config import has_file
from .forms import open_checkpoint
from .forms.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merge_adapter
from .forms.assemble import FormSource
from .forms.foreign import MODELOPT
from .forms.huggingface import check_metadata
from .forms.ollama import find_in_store
from .forms.shards import INDEX
from .generation import GENERATION, TOKENIZER_CONFIG, read_eos
from .synthetic import synthetic_source

NANO_CHECKPOINT = Path(__file__).parent.parent / "nano" / "checkpoint"
SYNTHETIC = "synthetic:"
ACCEPTED = (
    "`nano`, `synthetic:gpt-oss-20b`, `synthetic:gpt-oss-120b`, `synthetic:tiny`, a directory with "
    "a checkpoint, a GGUF file, a Hugging Face id such as `openai/gpt-oss-20b`, or a model that "
    "Ollama has, such as `gpt-oss:20b`"
)
HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADDRESS = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+?)/?")  # of its page
# What the library raises for an answer that is not a hub's, such as the page of a portal.
NO_ANSWER = (AssertionError, AttributeError, KeyError, TypeError, json.JSONDecodeError)

CONFIG_FILES = ["config.json", ADAPTER_CONFIG]  # of a model, or an adapter
METADATA_FILES = [
    *CONFIG_FILES,
    MODELOPT,  # it tells what cannot be read before that is fetched
    GENERATION,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    CHAT_TEMPLATE,
    INDEX,
]
WEIGHT_FILES = ["model*.safetensors"]
# `*` also matches a slash: without this, model/x.safetensors would count as top level.
SUBFOLDERS = ["*/*"]


@dataclass(frozen=True)
class Found:
    """Where a model is: `path` if it is here, `repo_id` if it is on Hugging Face, neither if it is
    made from a seed. `digest` names the content of what Ollama has; `name` is for people."""

    name: str
    path: Path | None = None
    repo_id: str | None = None
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resolved(Opened):
    """A model ready to compile; `name` is fit for a file name, `eos_token_ids` end a text."""

    name: str
    eos_token_ids: tuple[int, ...] = ()


def resolve_model(model: str | Path, adapters: Sequence[str | Path] = ()) -> Resolved:
    """Find a model: `nano`, `synthetic:NAME`, a directory or GGUF file in one of the forms, a model
    in Ollama's store, or a Hugging Face id to download.

    What lies here wins over an id of the same spelling. `adapters` are merged in order: folders of
    PEFT, or ids of them. Raises CheckpointError if nothing is found, the download fails (both
    AbsentError), or the checkpoint is not a complete gpt-oss.
    """
    try:
        return _resolve(model, adapters)
    except OSError as error:
        raise _unreadable(model, error) from error


def _resolve(model: str | Path, adapters: Sequence[str | Path]) -> Resolved:
    found = find_model(model)
    if found.path is not None:
        resolved = _from_path(found.path, found.name)
    elif found.repo_id is not None:
        resolved = _from_hub(found.repo_id)
    else:
        source = synthetic_source(str(model).removeprefix(SYNTHETIC))
        resolved = Resolved(source, name=found.name)
    for adapter in adapters:
        if not isinstance(resolved.source, FormSource):
            raise CheckpointError(
                f"{shown(model)}: expected a checkpoint to merge {shown(adapter)} into"
            )
        place = find_adapter(adapter)
        folder = place.path or _fetch(str(place.repo_id), [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
        merge_adapter(resolved.source, folder)
    return resolved


def find_model(model: str | Path) -> Found:
    """Where a model is that the user names; nothing of it is read or fetched. Raises AbsentError
    for a name that is none, CheckpointError for a place that may not be looked at."""
    if model == "nano":
        return Found("nano", NANO_CHECKPOINT)
    if isinstance(model, str) and model.startswith(SYNTHETIC):
        return Found(model.replace(":", "-"))
    path = _expanded(model)
    if _is_there(path):
        return Found(Path(path).resolve().name.removesuffix(".gguf"), Path(path))
    if (repo_id := _repo_id(model)) and repo_id != model:
        return Found(repo_id.rsplit("/", 1)[1], repo_id=repo_id)
    blob = find_in_store(model) if isinstance(model, str) else None
    if blob is not None:
        return Found(str(model).replace("/", "-").replace(":", "-"), blob, digest=blob.name)
    if repo_id is not None:
        return Found(repo_id.rsplit("/", 1)[1], repo_id=repo_id)
    raise AbsentError(f"{shown(model)}: no such model; expected {ACCEPTED}")


def find_adapter(adapter: str | Path) -> Found:
    """Where an adapter is: a folder here, or an id. Raises AbsentError for a name that is none."""
    path = _expanded(adapter)
    if _is_there(path) and os.path.isdir(path):
        return Found(Path(path).name, Path(path))
    if (repo_id := _repo_id(adapter)) is not None:
        return Found(repo_id.rsplit("/", 1)[1], repo_id=repo_id)
    raise AbsentError(
        f"{shown(adapter)}: expected the folder of an adapter, with {ADAPTER_CONFIG} and "
        f"{ADAPTER_WEIGHTS} as PEFT saves LoRA, or the id of one on Hugging Face, found neither"
    )


def find_revision(repo_id: str, online: bool) -> str | None:
    """The commit of a model or adapter on Hugging Face: that of what its cache holds, or None if
    that is nothing; `online`: the newest, whose config is fetched. Raises AbsentError if it
    cannot be, unless the cache holds some."""
    if online:
        return _fetch(repo_id, CONFIG_FILES).name
    try:
        folder = snapshot_download(repo_id, allow_patterns=CONFIG_FILES, local_files_only=True)
        return Path(folder).name
    except (OSError, ValueError):  # not there, or no name of a repository
        return None


def _repo_id(name: str | Path) -> str | None:
    """The id that is given, alone or as the address of its page."""
    if not isinstance(name, str):
        return None
    address = ADDRESS.fullmatch(name)
    found = address[1] if address is not None else name
    return found if HUGGING_FACE_ID.fullmatch(found) else None


def _expanded(name: str | Path) -> str:
    try:
        return os.path.expanduser(os.fspath(name))
    except ValueError:  # a zero byte in the name of a user
        return os.fspath(name)


def _is_there(path: str) -> bool:
    """False also for names that are too long or odd."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except (OSError, ValueError):
        return False
    return True


def _unreadable(model: str | Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{shown(model)}: expected a checkpoint that can be read, found: {error}; check the "
        "permissions of its folder and files"
    )


def _from_path(path: Path, name: str) -> Resolved:
    opened = open_checkpoint(path)
    vocab_size = opened.source.config.vocab_size
    _check_tokenizer(opened.tokenizer, vocab_size)
    eos_token_ids = read_eos(opened.generation, vocab_size, str(path))
    printable = "".join(c if c.isprintable() else "_" for c in name)  # as in a manifest
    return Resolved(**vars(opened), name=printable, eos_token_ids=eos_token_ids)


def _check_tokenizer(tokenizer: Path | bytes | None, vocab_size: int) -> None:
    """Refuse here what the runtime would refuse, or could not use, before any kernel is built."""
    if tokenizer is None:
        return
    try:
        if isinstance(tokenizer, bytes):
            size = Tokenizer(Path("tokenizer.json"), tokenizer).vocab_size
        else:
            size = Tokenizer(tokenizer).vocab_size
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    if size > vocab_size:
        raise CheckpointError(
            f"tokenizer: expected ids below {vocab_size}, the model's vocab_size, found up to "
            f"{size - 1}; is vocab_size in config.json right, and tokenizer.json this checkpoint's?"
        )


def _from_hub(repo_id: str) -> Resolved:
    """Fetch the metadata, check it, then fetch the weights (or find both in the cache)."""
    directory = _fetch(repo_id, METADATA_FILES)
    try:
        if (directory / "config.json").exists():
            config = check_metadata(directory)  # another model stops here, not after gigabytes
            tokenizer = directory / "tokenizer.json"
            _check_tokenizer(tokenizer if has_file(tokenizer) else None, config.vocab_size)
        elif (directory / ADAPTER_CONFIG).exists():
            _refuse_adapter(directory, repo_id)
        else:
            raise CheckpointError(
                f"{repo_id}: expected a config.json in the repository, found none; if it holds "
                f"GGUF files, get one with `hf download {repo_id} FILE` and give that file"
            )
        directory = _fetch(repo_id, METADATA_FILES + WEIGHT_FILES)
        return _from_path(directory, repo_id.rsplit("/", 1)[1])
    except CheckpointError as error:
        if not constants.HF_HUB_OFFLINE:
            raise
        raise type(error)(
            f"{error} (HF_HUB_OFFLINE is set, and what the cache has of {repo_id} may be "
            "incomplete: unset it once to download the rest)"
        ) from error


def _refuse_adapter(directory: Path, repo_id: str) -> NoReturn:
    """Tell that it is one, by its id: the folder is the cache's, whose name changes."""
    try:
        open_checkpoint(directory)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(directory), repo_id)) from error
    raise AssertionError(f"{directory}: an adapter opened as a model")


def _fetch(repo_id: str, files: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files, ignore_patterns=SUBFOLDERS))
    except GatedRepoError as error:
        raise AbsentError(
            f"{repo_id}: its owner gives access on request only; ask for it at "
            f"https://huggingface.co/{repo_id}, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise AbsentError(
            f"{repo_id}: neither a directory here nor a repository on Hugging Face that you may "
            "read; check the spelling, or log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise AbsentError(f"{repo_id}: {_why_absent(error)}") from error
    except NO_ANSWER as error:
        raise AbsentError(
            f"{repo_id}: its download failed: what the server answered is no answer of Hugging "
            "Face; is a proxy, or a portal that wants a login, in between? Check HF_ENDPOINT and "
            "the network, or give a directory that holds the checkpoint"
        ) from error
    except Exception as error:  # each version's HTTP library raises other types
        reason = shown([*str(error).strip().splitlines(), type(error).__name__][0])
        raise AbsentError(
            f"{repo_id}: not a directory here, and its download failed: {reason}; run it again to "
            "continue, or give a directory that holds the checkpoint"
        ) from error


def _why_absent(error: LocalEntryNotFoundError) -> str:
    """Why Hugging Face's cache had to do, and what to do where it has not all."""
    cause = error.__cause__
    if isinstance(cause, DisabledRepoError):
        return "Hugging Face has disabled this repository; choose another copy of the model"
    if constants.HF_HUB_OFFLINE:
        return (
            "its download failed: HF_HUB_OFFLINE is set, and Hugging Face's cache has nothing, or "
            "not all, of it; unset HF_HUB_OFFLINE or download it first, or give a directory that "
            "holds the checkpoint"
        )
    reason = shown((str(cause or error).strip() or type(cause).__name__).splitlines()[0])
    return (
        f"its download failed: Hugging Face cannot be reached ({reason}), "
        "and its cache has nothing, or not all, of it; check the network and run it again, or give "
        "a directory that holds the checkpoint"
    )
