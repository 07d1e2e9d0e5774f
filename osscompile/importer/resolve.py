"""Turn what the user names as a model into its weights, tokenizer and generation defaults."""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ..errors import CheckpointError
from ..runtime.errors import ArtifactError
from ..runtime.manifest import CHAT_TEMPLATE
from ..runtime.tokenizer import Tokenizer
from .checkpoint import Opened
from .forms import open_checkpoint
from .forms.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merge_adapter
from .forms.assemble import FormSource
from .forms.huggingface import check_metadata
from .forms.ollama import find_in_store
from .forms.shards import INDEX
from .generation import GENERATION, TOKENIZER_CONFIG
from .synthetic import synthetic_source

NANO_CHECKPOINT = Path(__file__).parent.parent / "nano" / "checkpoint"
SYNTHETIC = "synthetic:"
ACCEPTED = (
    "`nano`, `synthetic:gpt-oss-20b`, `synthetic:gpt-oss-120b`, `synthetic:tiny`, a directory with "
    "a checkpoint, a GGUF file, a Hugging Face id such as `openai/gpt-oss-20b`, or a model that "
    "Ollama has, such as `gpt-oss:20b`"
)
HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

METADATA_FILES = [
    "config.json",
    GENERATION,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    CHAT_TEMPLATE,
    INDEX,
    ADAPTER_CONFIG,
]
WEIGHT_FILES = ["model*.safetensors"]
# `*` also matches a slash: without this, model/x.safetensors would count as top level.
SUBFOLDERS = ["*/*"]


@dataclass(frozen=True, kw_only=True)
class Resolved(Opened):
    """A model ready to compile; `name` is fit for a file name."""

    name: str


def resolve_model(model: str | Path, adapters: Sequence[str | Path] = ()) -> Resolved:
    """Find a model: `nano`, `synthetic:NAME`, a directory or GGUF file in one of the forms, a model
    in Ollama's store, or a Hugging Face id to download.

    What lies here wins over an id of the same spelling. `adapters` are merged in order: folders of
    PEFT, or ids of them. Raises CheckpointError if nothing is found, the download fails, or the
    checkpoint is not a complete gpt-oss.
    """
    resolved = _resolve(model)
    for adapter in adapters:
        if not isinstance(resolved.source, FormSource):
            raise CheckpointError(f"{model}: expected a checkpoint to merge {adapter} into")
        merge_adapter(resolved.source, _adapter_folder(adapter))
    return resolved


def _resolve(model: str | Path) -> Resolved:
    if model == "nano":
        return _from_path(NANO_CHECKPOINT, "nano")
    if isinstance(model, str) and model.startswith(SYNTHETIC):
        name = model.removeprefix(SYNTHETIC)
        return Resolved(synthetic_source(name), name=f"synthetic-{name}")
    path = os.path.expanduser(model)  # os.path, because pathlib raises on names too long or odd
    if os.path.exists(path):
        name = Path(path).resolve().name.removesuffix(".gguf")
        return _from_path(Path(path), name)
    blob = find_in_store(model) if isinstance(model, str) else None
    if blob is not None:
        return _from_path(blob, str(model).replace("/", "-").replace(":", "-"))
    if isinstance(model, str) and HUGGING_FACE_ID.fullmatch(model):
        return _from_hub(model)
    raise CheckpointError(f"{model}: no such model; expected {ACCEPTED}")


def _adapter_folder(adapter: str | Path) -> Path:
    path = Path(os.path.expanduser(adapter))
    if not os.path.isdir(path) and isinstance(adapter, str) and HUGGING_FACE_ID.fullmatch(adapter):
        return _fetch(adapter, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    return path


def _from_path(path: Path, name: str) -> Resolved:
    opened = open_checkpoint(path)
    _check_tokenizer(opened.tokenizer)
    printable = "".join(c if c.isprintable() else "_" for c in name)  # as in a manifest
    return Resolved(**vars(opened), name=printable)


def _check_tokenizer(tokenizer: Path | bytes | None) -> None:
    """Refuse here what the runtime would refuse, before any kernel is built."""
    if tokenizer is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(tokenizer, bytes):
            content, tokenizer = tokenizer, Path(folder) / "tokenizer.json"
            tokenizer.write_bytes(content)
        try:
            Tokenizer(tokenizer)
        except ArtifactError as error:
            raise CheckpointError(str(error)) from error


def _from_hub(repo_id: str) -> Resolved:
    """Fetch the metadata, check it, then fetch the weights (or find both in the cache)."""
    directory = _fetch(repo_id, METADATA_FILES)
    try:
        if (directory / "config.json").exists():
            check_metadata(directory)  # another model stops here, not after its gigabytes
            tokenizer = directory / "tokenizer.json"
            _check_tokenizer(tokenizer if tokenizer.is_file() else None)
        elif not (directory / ADAPTER_CONFIG).exists():
            raise CheckpointError(
                f"{repo_id}: expected a config.json in the repository, found none; if it holds "
                f"GGUF files, get one with `hf download {repo_id} FILE` and give that file"
            )
        directory = _fetch(repo_id, METADATA_FILES + WEIGHT_FILES)
        return _from_path(directory, repo_id.rsplit("/", 1)[1])
    except CheckpointError as error:
        if not constants.HF_HUB_OFFLINE:
            raise
        raise CheckpointError(
            f"{error} (HF_HUB_OFFLINE is set, and what the cache has of {repo_id} may be "
            "incomplete: unset it once to download the rest)"
        ) from error


def _fetch(repo_id: str, files: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files, ignore_patterns=SUBFOLDERS))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id}: its owner gives access on request only; ask for it at "
            f"https://huggingface.co/{repo_id}, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: neither a directory here nor a repository on Hugging Face that you may "
            "read; check the spelling, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # each version's HTTP library raises other types
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{repo_id}: not a directory here, and its download failed: "
            f"{reason[0] if reason else type(error).__name__}; run it again to continue, or give a "
            "directory that holds the checkpoint"
        ) from error
