"""Find the model that a user names. Nothing here touches the network."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config_json, write_checkpoint
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from osscompile.errors import CheckpointError
from osscompile.importer import resolve
from osscompile.importer.resolve import resolve_model
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.runtime.sampling_options import Sampling

SOURCE = SyntheticSource(TINY)

# WANTED and UNWANTED list the files of openai/gpt-oss-20b, and some traps.
WANTED = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00000-of-00002.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
UNWANTED = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "USAGE_POLICY",
    "special_tokens_map.json",
    "metal/model.bin",
    "original/config.json",
    "original/dtypes.json",
    "original/model.safetensors",
    "model/extra.safetensors",
    "model-old/model-00000-of-00002.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "my-model", SOURCE)


class Hub:
    """Stands for `snapshot_download`: gives the files of one folder that match the patterns."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.cache = cache
        self.requests: list[list[str]] = []

    def __call__(self, repo_id: str, **patterns: Any) -> str:
        present = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*.*")]
        self.requests.append(sorted(filter_repo_objects(present, **patterns)))
        for name in self.requests[-1]:
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, self.cache / name)
        return str(self.cache)


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "no-store"))
    hub = Hub(checkpoint, tmp_path / "cache")
    monkeypatch.setattr(resolve, "snapshot_download", hub)
    return hub


def test_nano_is_shipped() -> None:
    resolved = resolve_model("nano")
    assert resolved.name == "nano"
    assert resolved.tokenizer is not None
    assert "eos_token_id" in resolved.generation
    assert resolved.sampling == Sampling(temperature=0.0)


def test_synthetic() -> None:
    resolved = resolve_model("synthetic:tiny")
    assert resolved.source.config == TINY
    assert (resolved.tokenizer, resolved.generation) == (None, {})
    assert (resolved.sampling, resolved.chat_template) == (Sampling(), None)
    assert resolved.name == "synthetic-tiny"


def test_unknown_synthetic() -> None:
    with pytest.raises(CheckpointError, match="synthetic:huge: expected one of"):
        resolve_model("synthetic:huge")


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer, whose last id is the last of the vocabulary."""
    checkpoint = write_checkpoint(tmp_path / "my-model", replace(TINY, vocab_size=1024))
    shutil.copy(resolve.NANO_CHECKPOINT / "tokenizer.json", checkpoint)
    return checkpoint


@pytest.mark.parametrize("kind", [str, Path])
def test_directory(speaking: Path, kind: type) -> None:
    checkpoint = speaking
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    resolved = resolve_model(kind(checkpoint))
    assert resolved.source.config == replace(TINY, vocab_size=1024)
    assert resolved.eos_token_ids == (7, 9)
    assert resolved.tokenizer == checkpoint / "tokenizer.json"
    assert resolved.generation == {"eos_token_id": [7, 9]}
    assert resolved.name == "my-model"


def test_directory_without_tokenizer_and_generation_config(checkpoint: Path) -> None:
    resolved = resolve_model(checkpoint)
    assert (resolved.tokenizer, resolved.generation) == (None, {})


def test_damaged_generation_config(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not JSON"):
        resolve_model(checkpoint)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_what_is_said_of_its_use_is_checked_before_the_weights(hub: Hub, name: str) -> None:
    (hub.folder / name).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=f"{name}: not "):
        resolve_model("org/my-model")
    assert len(hub.requests) == 1


NO_TOKENIZERS = {
    "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0614\nsize 27868174\n",
    "cut_off": (resolve.NANO_CHECKPOINT / "tokenizer.json").read_text()[:-100],
    "other_json": "{}",
    "page": "<!doctype html><html></html>",
    "empty": "",
}


@pytest.mark.parametrize("text", NO_TOKENIZERS.values(), ids=list(NO_TOKENIZERS))
def test_tokenizer_that_is_none(checkpoint: Path, text: str) -> None:
    (checkpoint / "tokenizer.json").write_text(text)
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer\.json(: expected the file itself| which does not parse).*git-lfs",
    ):
        resolve_model(checkpoint)


def test_tokenizer_that_is_none_is_refused_before_the_weights(hub: Hub) -> None:
    (hub.folder / "tokenizer.json").write_text(NO_TOKENIZERS["pointer"])
    with pytest.raises(CheckpointError, match="git-lfs"):
        resolve_model("org/my-model")
    assert len(hub.requests) == 1


def test_weights_of_modelopt_are_refused_before_they_are_fetched(hub: Hub) -> None:
    """Only this file tells, where config.json says nothing."""
    (hub.folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: .*'FP8', of NVIDIA Model"):
        resolve_model("org/my-model")
    assert len(hub.requests) == 1


OPTIONAL = ("tokenizer.json", "generation_config.json", "chat_template.jinja")


@pytest.mark.parametrize("name", [*OPTIONAL, "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["folder", "link to nothing", "pipe"])
def test_file_that_is_none(checkpoint: Path, name: str, kind: str) -> None:
    """It is not taken for one that was left out, and a pipe is not waited for."""
    file = checkpoint / name
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"{name}: (expected a file|not found)"):
        resolve_model(checkpoint)


def test_tokenizer_of_a_larger_vocabulary(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", replace(TINY, vocab_size=1023))
    shutil.copy(resolve.NANO_CHECKPOINT / "tokenizer.json", checkpoint)
    with pytest.raises(CheckpointError, match=r"ids below 1023, .* found up to 1023; is vocab"):
        resolve_model(checkpoint)


@pytest.mark.parametrize("wrong", [True, "x", {"a": 1}, 2.0, -1, 512, [7, False], [[7]]], ids=str)
def test_what_ends_a_text_is_no_id(checkpoint: Path, hub: Hub, wrong: Any) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    message = r"eos_token_id: expected token ids from 0 to 511, found .*; correct it, or leave"
    with pytest.raises(CheckpointError, match=message):
        resolve_model(checkpoint)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        resolve_model("org/my-model")
    assert len(hub.requests) == 1  # before the weights


@pytest.mark.parametrize(("given", "ids"), [(None, ()), ([], ()), (0, (0,)), ([511, 0], (511, 0))])
def test_what_ends_a_text(checkpoint: Path, given: object, ids: tuple[int, ...]) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert resolve_model(checkpoint).eos_token_ids == ids


@pytest.mark.parametrize("adapter", ["nope", "", "\0", "~\0", "x" * 5000, Path("nope")], ids=repr)
def test_adapter_that_is_none(checkpoint: Path, adapter: str | Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected the folder of an adapter, with adapter_config"
    ):
        resolve_model(checkpoint, [adapter])
    with pytest.raises(CheckpointError, match=r"expected a folder with adapter_config.*found no"):
        resolve_model(checkpoint, [checkpoint])


def test_directory_whose_name_cannot_be_printed(checkpoint: Path, tmp_path: Path) -> None:
    renamed = checkpoint.rename(tmp_path / "a\n\x1b\udcffb")
    assert resolve_model(renamed).name == "a___b"


def test_directory_called_nano(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.rename(checkpoint.parent / "nano")
    monkeypatch.chdir(checkpoint.parent)
    assert resolve_model("./nano").source.config == TINY
    assert resolve_model(Path("nano")).source.config == TINY


def test_directory_wins_over_a_hugging_face_id(checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "org" / "name")
    assert resolve_model("org/name").name == "name"
    assert hub.requests == []


def test_hugging_face_id(hub: Hub) -> None:
    resolved = resolve_model("org/my-model")
    assert resolved.source.config == TINY
    assert resolved.name == "my-model"
    metadata, everything = hub.requests
    assert metadata == ["config.json", "model.safetensors.index.json"]
    assert set(everything) - set(metadata) == {
        "model-00000-of-00001.safetensors",
        "model-00001-of-00001.safetensors",
    }


def test_other_model_is_refused_before_its_weights(hub: Hub) -> None:
    config = config_json(TINY) | {"model_type": "llama"}
    (hub.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected 'gpt_oss'"):
        resolve_model("org/llama")
    assert len(hub.requests) == 1


def test_download_takes_the_top_level_only(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []

    def download(repo_id: str, **patterns: Any) -> str:
        taken.append(sorted(filter_repo_objects(WANTED + UNWANTED, **patterns)))
        return str(checkpoint)

    monkeypatch.setattr(resolve, "snapshot_download", download)
    resolve_model("openai/gpt-oss-20b")
    assert taken[-1] == WANTED
    assert not any(name.endswith(".safetensors") for name in taken[0])


def test_commit_of_what_the_hubs_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's own library reads its cache; no network is asked."""
    monkeypatch.setattr(resolve.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", None)
    assert resolve.find_revision("org/name", online=False) is None
    folder = tmp_path / "models--org--name"
    for name, content in (("refs/main", "1" * 40), (f"snapshots/{'1' * 40}/config.json", "{}")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    assert resolve.find_revision("org/name", online=False) == "1" * 40
    assert resolve.find_revision("no--name/./", online=False) is None


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find the requested files\nin the cache"),
        ConnectionError(),
        OSError(28, "No space left on device"),
    ],
)
def test_failing_download(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(repo_id: str, **patterns: Any) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"org/name: .*download failed: .*give a directory"):
        resolve_model("org/name")


def failing(cause: BaseException | None, error: BaseException) -> Any:
    def download(repo_id: str, **patterns: Any) -> str:
        raise error from cause

    return download


class Disabled(resolve.DisabledRepoError):
    def __init__(self) -> None:  # the real one wants an HTTP response
        pass


NO_FILES = LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
WHY_ABSENT: dict[str, tuple[bool, BaseException | None, BaseException, str]] = {
    "network": (False, ConnectionError("no route"), NO_FILES, r"reached \(no route\).* network"),
    "offline": (True, None, NO_FILES, "unset HF_HUB_OFFLINE or download it first"),
    "disabled": (False, Disabled(), NO_FILES, "has disabled this repository"),
    "page": (False, None, json.JSONDecodeError("Expecting value", "<", 0), "a proxy, or a portal"),
    "other_json": (False, None, TypeError("string indices must be"), "a proxy, or a portal"),
}


@pytest.mark.parametrize("why", WHY_ABSENT)
def test_why_nothing_could_be_fetched(
    why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline, cause, error, message = WHY_ABSENT[why]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(resolve, "snapshot_download", failing(cause, error))
    with pytest.raises(resolve.AbsentError, match=f"org/name: .*{message}"):
        resolve_model("org/name")


@pytest.mark.parametrize("address", ["https://huggingface.co/org/name", "https://hf.co/org/name/"])
def test_address_of_a_page(address: str, hub: Hub) -> None:
    assert resolve.find_model(address) == resolve.find_model("org/name")
    assert resolve.find_adapter(address).repo_id == "org/name"
    with pytest.raises(CheckpointError, match="no such model"):
        resolve.find_model("https://example.org/org/name")


def test_unknown_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class NotFound(resolve.RepositoryNotFoundError):
        def __init__(self) -> None:  # the real one wants an HTTP response
            pass

    def download(repo_id: str, **patterns: Any) -> str:
        raise NotFound

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="neither a directory here nor a repository"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    "model",
    [
        "gpt-oss",
        "a/b/c",
        "./absent",
        "../a/b",
        "/absent",
        "",
        "x" * 5000,
        "a\0b",
        "~\0",
        "~no-x/y z",
    ],
)
def test_neither_of_these(model: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no such model; expected `nano`, `synthetic:"):
        resolve_model(model)
    assert hub.requests == []


def test_a_name_that_a_terminal_would_obey(hub: Hub) -> None:
    for find in (resolve.find_model, resolve.find_adapter):
        with pytest.raises(CheckpointError) as caught:
            find("a\n\x1b[2J\udcff" + "x" * 5000)
        message = str(caught.value)
        assert message.isprintable() and len(message) < 1000 and "a??[2J?xxx" in message


def test_neither_a_directory_nor_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    for path in ("/dev/null", tmp_path / "m.gguf"):
        with pytest.raises(CheckpointError, match=r"a directory or a GGUF file, found neither"):
            resolve_model(path)


def test_file_instead_of_a_directory(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="found a file; give its directory"):
        resolve_model(checkpoint / "config.json")
