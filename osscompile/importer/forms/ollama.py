"""Find a model in Ollama's local store by the name that Ollama gives it: `gpt-oss:20b`."""

import os
import re
from pathlib import Path

from ...errors import AbsentError, CheckpointError
from ...options import shown
from ..config import read_json_object

STORE = "OLLAMA_MODELS"  # names the folder, if it is not the usual one
NAME = re.compile(r"((?:[\w][\w.-]*/)*)([\w][\w.-]*)(?::([\w][\w.-]*))?", re.ASCII)
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
MODEL = "application/vnd.ollama.image.model"
ADAPTER = "application/vnd.ollama.image.adapter"


def find_in_store(model: str) -> Path | None:
    """The GGUF of a model, or None if it is not spelt NAME or NAME:TAG, or, without a tag, not
    there. Raises AbsentError if the store does not have it, CheckpointError if its manifest is
    damaged."""
    match = NAME.fullmatch(model)
    if match is None or (match[1] and not match[3]):  # ORG/NAME is an id of Hugging Face
        return None
    store = Path(os.environ.get(STORE) or os.path.expanduser("~/.ollama/models"))
    owner, name, tag = match[1].rstrip("/") or "library", match[2], match[3] or "latest"
    registry = () if "/" in owner else ("registry.ollama.ai",)
    manifest = store.joinpath("manifests", *registry, owner, name, tag)
    if not os.path.isfile(manifest):  # of pathlib, a name too long is an error
        if not match[3]:
            return None
        raise AbsentError(
            f"{shown(model)}: expected it in Ollama's store, found no {shown(manifest)}; get it "
            f"with `ollama pull {shown(model)}`, or name the store in {STORE}"
        )
    return _blob(store, manifest)


def _blob(store: Path, manifest: Path) -> Path:
    """The file that holds the weights. The manifest is not trusted: it names no path."""
    layers = read_json_object(manifest).get("layers")
    digests: dict[str, list[str]] = {}
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict):
            digest = DIGEST.fullmatch(str(layer.get("digest")))
            if digest is not None:
                digests.setdefault(str(layer.get("mediaType")), []).append(digest[1])
    if len(digests.get(MODEL, [])) != 1:
        raise CheckpointError(
            f"{manifest}: expected one layer {MODEL} with a sha256, found "
            f"{len(digests.get(MODEL, []))}; pull the model again"
        )
    if ADAPTER in digests:
        raise CheckpointError(
            f"{manifest}: expected a whole model, found one with an adapter apart from it, which "
            "is not read; merge it, or compile the model that it was made for"
        )
    blob = store / "blobs" / f"sha256-{digests[MODEL][0]}"
    if not blob.is_file():
        raise CheckpointError(f"{blob}: expected it, as {manifest} names it; pull the model again")
    return blob
