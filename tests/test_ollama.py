"""Models out of Ollama's local store, by name."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from forms import Type, ollama_fields, ollama_tensors, write_gguf

from osscompile.errors import CheckpointError
from osscompile.importer.resolve import resolve_model
from osscompile.importer.synthetic import TINY, SyntheticSource

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer. expected model")

MODEL = "application/vnd.ollama.image.model"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that has gpt-oss:tiny."""
    store = tmp_path / "models"
    (store / "blobs").mkdir(parents=True)
    tensors = ollama_tensors(SyntheticSource(TINY), Type.BF16)
    blob = store / "blobs" / "new"
    write_gguf(blob, TINY, tensors, architecture="gptoss", fields=ollama_fields(TINY))
    digest = hashlib.sha256(blob.read_bytes()).hexdigest()
    blob.rename(store / "blobs" / f"sha256-{digest}")
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": MODEL, "digest": f"sha256:{digest}", "size": 1},
    ]
    for place in ("registry.ollama.ai/library/gpt-oss/tiny", "registry.ollama.ai/me/mine/latest"):
        write_manifest(store, place, layers)
    write_manifest(store, "hf.co/org/name/Q8", layers)
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    monkeypatch.chdir(tmp_path)
    return store


def write_manifest(store: Path, place: str, layers: Any) -> Path:
    path = store / "manifests" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return path


@pytest.mark.parametrize("name", ["gpt-oss:tiny", "me/mine:latest", "hf.co/org/name:Q8"])
def test_model_by_name(store: Path, name: str) -> None:
    resolved = resolve_model(name)
    assert resolved.source.config == TINY
    assert resolved.name == name.replace("/", "-").replace(":", "-")


def test_name_without_a_tag_is_the_latest(store: Path) -> None:
    manifests = store / "manifests" / "registry.ollama.ai" / "library" / "gpt-oss"
    (manifests / "tiny").rename(manifests / "latest")
    assert resolve_model("gpt-oss").source.config == TINY


def test_store_in_the_home_folder(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = store.parent / "home"
    (home / ".ollama").mkdir(parents=True)
    store.rename(home / ".ollama" / "models")
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(home))
    assert resolve_model("gpt-oss:tiny").source.config == TINY


def test_model_that_was_not_pulled(store: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gpt-oss:20b: .*store.*`ollama pull gpt-oss:20b`"):
        resolve_model("gpt-oss:20b")


@pytest.mark.parametrize(
    "layers",
    [
        None,
        [],
        [3],
        [{"mediaType": MODEL, "digest": "sha256:../../../etc/passwd"}],
        [{"mediaType": MODEL, "digest": 7}],
        [{"mediaType": MODEL, "digest": f"sha256:{i:064x}"} for i in range(2)],
    ],
)
def test_manifest_without_one_model(store: Path, layers: Any) -> None:
    write_manifest(store, "registry.ollama.ai/library/bad/1", layers)
    with pytest.raises(CheckpointError, match=r"bad/1: expected one layer .*pull the model again"):
        resolve_model("bad:1")


def test_manifest_whose_blob_is_gone(store: Path) -> None:
    layers = [{"mediaType": MODEL, "digest": "sha256:" + "0" * 64}]
    write_manifest(store, "registry.ollama.ai/library/bad/1", layers)
    with pytest.raises(CheckpointError, match=r"sha256-0+: expected it, as .*pull the model"):
        resolve_model("bad:1")


def test_model_with_an_adapter_apart(store: Path) -> None:
    manifest = store / "manifests/registry.ollama.ai/library/gpt-oss/tiny"
    layers = json.loads(manifest.read_text())["layers"]
    adapter = {"mediaType": MODEL.removesuffix("model") + "adapter", "digest": "sha256:" + "1" * 64}
    write_manifest(store, "registry.ollama.ai/library/gpt-oss/tuned", [*layers, adapter])
    with pytest.raises(CheckpointError, match="found one with an adapter apart"):
        resolve_model("gpt-oss:tuned")


def test_damaged_manifest(store: Path) -> None:
    path = write_manifest(store, "registry.ollama.ai/library/bad/1", [])
    path.write_text("{")
    with pytest.raises(CheckpointError, match="bad/1: not JSON"):
        resolve_model("bad:1")
