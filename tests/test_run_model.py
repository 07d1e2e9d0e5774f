"""`osscompile run MODEL`: one step from a model to its answer."""

import os
import shutil
from pathlib import Path

import pytest
from artifacts import copy_artifact, flip_byte
from cached import Compiler, Hub
from cached import cache as cache  # fixtures
from cached import compiles as compiles
from cached import hub as hub
from test_cache import Run
from test_cache import run as run

from osscompile.cache.compile_once import compile_once
from osscompile.cache.entries import list_entries
from osscompile.runtime import load

QUESTION = "What is 17 + 25?"
ANSWER = "17 + 25 = 42."


def test_compiled_once_and_run_twice(
    cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compiles tells how far it is, and the answer alone goes to the output."""
    status, said, told = run("run", "nano", QUESTION, "--hide-analysis")
    assert (status, said.strip()) == (0, ANSWER)
    assert "compiling its kernels" in told
    (entry,) = list_entries()
    monkeypatch.setattr("osscompile.compiler.compile", None)
    for name in ("nano", entry.name):
        assert run("run", name, QUESTION, "--hide-analysis") == (0, said, "")
    shown = run("list")[1]
    assert entry.name in shown and "  fast " in shown and "  0.0" in shown


def test_options_that_compile_and_options_that_load(
    nano_artifact: Path, compiles: Compiler, run: Run
) -> None:
    compiles.artifact = nano_artifact
    options = ["--profile", "exact", "--adapter", "a", "--adapter", "b"]
    for name in "ab":
        Path(name).mkdir()
    for context in ("256", "512"):  # one artifact serves both
        assert run("run", "nano", QUESTION, *options, "--context", context)[0] == 0
    (call,) = compiles.calls
    assert (call["profile"], call["adapters"]) == ("exact", ["a", "b"])
    status, _, errors = run("run", "nano", QUESTION, *options, "--context", "8")
    assert status == 1 and "8" in errors


@pytest.mark.parametrize("option", [("--target", "x"), ("--profile", ""), ("--adapter", "x")])
def test_options_of_a_compile_for_what_is_compiled(
    option: tuple[str, str], nano_artifact: Path, compiles: Compiler, run: Run
) -> None:
    compiles.artifact = nano_artifact
    for name in (str(nano_artifact), compile_once("nano").parent.name):
        status, _, errors = run("run", name, QUESTION, *option)
        assert status == 1
        assert f"{option[0]}: expected a model to compile, found {name}" in errors


def test_an_artifact_with_the_name_of_a_model(
    nano_artifact: Path, compiles: Compiler, run: Run, tmp_path: Path
) -> None:
    copy_artifact(nano_artifact, tmp_path).rename(tmp_path / "nano")
    assert run("run", "nano", QUESTION)[0] == 0
    assert compiles.calls == []


@pytest.mark.parametrize("name", ["20b.osc", "out/20b.osc", "nothing", "/nothing", "", "\0"])
def test_neither_an_artifact_nor_a_model(name: str, hub: Hub, compiles: Compiler, run: Run) -> None:
    """Hugging Face is not asked for what is spelt like an artifact."""
    status, _, errors = run("run", name, QUESTION)
    assert status == 1 and hub.online == 0
    named = name.replace("\0", "?")
    assert f"{named}: expected an artifact or a model, found neither: " in errors
    assert "osscompile compile MODEL -o OUT" in errors


def test_what_is_not_there_is_named(hub: Hub, compiles: Compiler, run: Run) -> None:
    hub.newest = None
    for what in (["org/name"], ["nano", QUESTION, "--adapter", "lora"]):
        status, _, errors = run("run", *what)
        assert status == 1 and "artifact" not in errors
        expected = "lora: expected the folder of an adapter" if len(what) > 1 else "org/name: not a"
        assert errors.startswith(f"osscompile: {expected}")
    assert "`ollama pull gpt-oss:9b`" in run("run", "gpt-oss:9b", QUESTION)[2]


def test_a_folder_that_is_neither(run: Run, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "20b.osc").mkdir()
    status, _, errors = run("run", "20b.osc", QUESTION)
    assert status == 1 and "config.json: not found; expected a directory" in errors
    assert os.listdir(cache) == []


def test_a_damaged_entry_is_told_how_to_mend(
    nano_artifact: Path, compiles: Compiler, run: Run
) -> None:
    compiles.artifact = nano_artifact
    artifact = compile_once("nano")
    flip_byte(artifact / "weights.safetensors", -1)
    status, _, errors = run("run", "nano", QUESTION)
    assert status == 1 and "the artifact is damaged" in errors
    assert "`osscompile rm` removes it" in errors
    damaged = copy_artifact(artifact, artifact.parent.parent.parent)
    assert "`osscompile rm`" not in run("run", str(damaged), QUESTION)[2]


def test_a_target_that_cannot_run_here(cache: Path, run: Run) -> None:
    status, _, errors = run("run", "nano", QUESTION, "--target", "abacus")
    assert status == 1 and "expected one of " in errors
    assert not cache.exists()


def test_a_profile_that_is_none(run: Run, cache: Path) -> None:
    status, _, errors = run("run", "nano", QUESTION, "--profile", "exakt")
    assert status == 1 and "profile: expected one of fast, exact, found 'exakt'" in errors
    assert os.listdir(cache) == []


def test_too_little_room(cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, _, errors = run("run", "nano", QUESTION)
    assert status == 1 and os.listdir(cache) == []
    assert f"{cache}" in errors and "needs 0.10 GB of disk, found 0.00 GB free" in errors
    assert "set OSSCOMPILE_CACHE to another folder" in errors


def test_removed_while_it_runs(
    nano_artifact: Path, compiles: Compiler, run: Run, cache: Path
) -> None:
    """Its weights are mapped: whoever runs it goes on."""
    compiles.artifact = nano_artifact
    model = load(compile_once("nano"))
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    pieces = model.chat(question)
    said = [next(pieces)]
    assert run("rm", "nano")[0] == 0 and os.listdir(cache) == []
    said += pieces
    assert "".join(p.text for p in said if p.channel == "final") == "17 + 25 = 42."
