"""What `run MODEL` does where a model is gone, or Hugging Face and Ollama tell what it is."""

import os
from pathlib import Path

import pytest
from cached import Compiler, Hub
from cached import adapter as adapter  # fixtures
from cached import cache as cache
from cached import compiles as compiles
from cached import hub as hub
from cached import model as model

from osscompile.cache.compile_once import compile_once
from osscompile.cache.entries import list_entries
from osscompile.errors import AbsentError
from osscompile.importer import resolve
from osscompile.targets import Target

# Gone


def test_a_model_that_is_gone_is_run_as_it_was(
    model: Path, compiles: Compiler, this_machine: Target
) -> None:
    first = compile_once("./my model", adapters=[])
    model.rename(model.with_name("other"))
    with pytest.warns(UserWarning, match=r"my model: no such model.*; my_model-.* is run,"):
        assert compile_once("my model") == first
    with pytest.raises(AbsentError, match="no such model"):
        compile_once("my model", profile="exact")


def test_a_folder_that_is_gone_is_no_id(model: Path, hub: Hub, compiles: Compiler) -> None:
    """Its path is spelt like one."""
    folder = model.with_name("models") / "mine"
    folder.parent.mkdir()
    model.rename(folder)
    first = compile_once("models/mine")
    folder.rename(folder.with_name("other"))
    with pytest.warns(UserWarning, match=r"models/mine: expected /.*/mine, .* found it gone; name"):
        assert compile_once("models/mine") == first
    assert hub.online == 0


def test_an_adapter_that_is_gone(model: Path, adapter: Path, compiles: Compiler) -> None:
    first = compile_once(str(model), adapters=["adapter"])
    adapter.rename(adapter.with_name("other"))
    with pytest.warns(
        UserWarning, match=r"adapter: expected the folder of .*; my_model-.* is run,"
    ):
        assert compile_once(str(model), adapters=["adapter"]) == first


# Hugging Face


def test_an_id_without_the_network(hub: Hub, compiles: Compiler) -> None:
    first = compile_once("org/model")
    asked, hub.newest = hub.online, None
    assert compile_once("org/model") == first and hub.online == asked
    (entry,) = list_entries()
    assert entry.name.startswith("model-") and entry.facts.model == "org/model"


def test_a_newer_commit_counts_once_it_is_here(hub: Hub, compiles: Compiler) -> None:
    first = compile_once("org/model")
    hub.newest = "2" * 40
    assert compile_once("org/model") == first
    hub.cached = hub.newest
    assert compile_once("org/model") != first


def test_a_compile_asks_for_the_newest_commit(hub: Hub, compiles: Compiler) -> None:
    hub.cached = "0" * 40
    first = compile_once("org/model")
    assert hub.cached == hub.newest
    assert compile_once("org/model") == first and len(compiles.calls) == 1


def test_an_id_that_is_gone_from_the_hubs_cache(hub: Hub, compiles: Compiler) -> None:
    first = compile_once("org/model")
    hub.cached, asked = None, hub.online
    with pytest.warns(UserWarning, match=r"org/model: .* found nothing of it; model-.* is run"):
        assert compile_once("org/model") == first
    assert hub.online == asked


def test_an_id_whose_newer_commit_cannot_be_fetched(hub: Hub, compiles: Compiler) -> None:
    first = compile_once("org/model")
    hub.newest = hub.cached = "2" * 40
    compiles.error = AbsentError("org/model: its download failed")
    with pytest.warns(UserWarning, match=r"its download failed; model-.* is run, compiled on"):
        assert compile_once("org/model") == first


def test_an_id_that_was_never_compiled_and_cannot_be_reached(hub: Hub, compiles: Compiler) -> None:
    hub.newest = None
    with pytest.raises(AbsentError, match=r"org/model: .*its download failed"):
        compile_once("org/model")


def test_an_adapter_by_its_id(hub: Hub, model: Path, compiles: Compiler) -> None:
    first = compile_once(str(model), adapters=["org/adapter"])
    hub.newest = hub.cached = "2" * 40
    assert compile_once(str(model), adapters=["org/adapter"]) != first


# Ollama


def test_a_model_of_ollama_by_its_digest(
    tmp_path: Path, compiles: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = [tmp_path / f"sha256-{digit * 64}" for digit in "01"]
    for blob in blobs:
        blob.write_bytes(b"GGUF")
    monkeypatch.setattr(resolve, "find_in_store", lambda name: blobs[0])
    first = compile_once("gpt-oss:20b")
    os.utime(blobs[0], (0, 0))  # pulled again
    assert compile_once("gpt-oss:20b") == first
    assert first.parent.name.startswith("gpt-oss-20b-")
    monkeypatch.setattr(resolve, "find_in_store", lambda name: blobs[1])
    assert compile_once("gpt-oss:20b") != first
