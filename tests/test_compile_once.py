"""`run MODEL` compiles what it has not compiled yet, once, and what has changed again."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from cached import Compiler
from cached import adapter as adapter  # fixtures
from cached import cache as cache
from cached import compiles as compiles
from cached import model as model
from forms import write_original

from osscompile import CheckpointError, CompileError
from osscompile.cache import entries, facts
from osscompile.cache.compile_once import compile_once
from osscompile.cache.entries import checkpoint_state, list_entries, stale_entries
from osscompile.errors import PlaceError
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.schedules.records import user_records_file
from osscompile.targets import Target


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Once


@pytest.mark.parametrize("name", ["nano", "synthetic:tiny", "my model"])
def test_the_second_time_nothing_is_compiled(
    name: str, model: Path, compiles: Compiler, cache: Path, this_machine: Target
) -> None:
    first = compile_once(name)
    with warnings.catch_warnings(action="error"):  # without a word
        assert compile_once(name) == first
    assert first.is_relative_to(cache)
    expected = {
        "model": name,
        "target": this_machine.name,
        "variants": this_machine.variant,
        "profile": "fast",
        "adapters": (),
        "progress": True,
    }
    assert compiles.calls == [expected]
    (entry,) = list_entries()
    plain = name.replace(":", "-").replace(" ", "_")
    assert entry.name.startswith(f"{plain}-{this_machine.name}-fast-")
    assert listing(cache) == [entry.name] and listing(entry.folder) == ["artifact", "entry.json"]


def test_the_same_folder_by_another_path(
    model: Path, compiles: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = compile_once(str(model))
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    assert compile_once(".") == compile_once("../link") == first


def test_a_folder_called_nano(
    model: Path, compiles: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = compile_once("nano")
    model.rename(model.parent / "nano")
    assert compile_once("nano") == shipped != compile_once("./nano")


def test_use_is_remembered(compiles: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_once("nano")
    (entry,) = list_entries()
    os.utime(entry.folder / entries.FACTS, (0, 0))
    compile_once("nano")
    assert entry.used() > 0

    def refuse(path: Path) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)  # a cache that may only be read
    assert compile_once("nano") == entry.artifact


# Again


def grow(model: Path) -> None:
    file = next(model.glob("*.safetensors"))
    times = file.stat()
    with file.open("ab") as stream:
        stream.write(b"\0")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def touch(model: Path) -> None:
    file = next(model.glob("*.safetensors"))
    times = file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def add_to_index(model: Path) -> None:
    """A shard in a folder of its own."""
    (model / "more").mkdir()
    file = model / "more" / "model.safetensors"
    file.write_bytes(bytes(8))
    index = model / "model.safetensors.index.json"
    before = index.stat()
    content = json.loads(index.read_text())
    content["weight_map"]["extra"] = "more/model.safetensors"
    index.write_text(json.dumps(content))
    os.utime(index, ns=(before.st_atime_ns, before.st_mtime_ns))
    compile_once(str(model))
    os.utime(file, ns=(0, 0))


CHANGES = [
    grow,
    touch,
    add_to_index,
    lambda model: (model / "config.json").write_text("{}"),
    lambda model: (model / "tokenizer.json").write_text("{}"),
    lambda model: next(model.glob("*.safetensors")).unlink(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint(
    change: Callable[[Path], object], model: Path, compiles: Compiler
) -> None:
    first = compile_once(str(model))
    change(model)
    count = len(compiles.calls)
    second = compile_once(str(model))
    assert second != first and len(compiles.calls) == count + 1
    assert first.exists()  # for whoever wants it still
    assert compile_once(str(model)) == second


def test_what_no_checkpoint_is_read_from(model: Path, compiles: Compiler) -> None:
    first = compile_once(str(model))
    (model / "README.md").write_text("new")
    (model / "checkpoint-500").mkdir()
    assert compile_once(str(model)) == first


def test_a_split_gguf_whose_second_file_changes(tmp_path: Path, compiles: Compiler) -> None:
    parts = [tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    first = compile_once(str(parts[0]))
    parts[1].write_bytes(b"GGUF2")
    assert compile_once(str(parts[0])) != first


def test_options(model: Path, adapter: Path, compiles: Compiler) -> None:
    name, more = str(model), str(adapter)
    found = [
        compile_once(name),
        compile_once(name, profile="exact"),
        compile_once(name, adapters=[more]),
        compile_once(name, adapters=[more, more]),
    ]
    assert len(set(found)) == 4
    assert [call["adapters"] for call in compiles.calls] == [(), (), [more], [more, more]]
    assert not stale_entries(list_entries())  # another request makes none older


DECIDING = ("chat_template.jinja", "generation_config.json", "tokenizer.json")


@pytest.mark.parametrize("form", ["hugging face", "openai"])
@pytest.mark.parametrize("name", [*DECIDING, "tokenizer_config.json"])
def test_a_changed_file_beside_the_weights(
    name: str, form: str, model: Path, compiles: Compiler
) -> None:
    """OpenAI's form has it one folder up."""
    openai = form == "openai"
    given = write_original(model / "original", SyntheticSource(TINY)) if openai else model
    before = compile_once(str(given))
    for text in ("{}", "{ }"):
        (model / name).write_text(text)
        (entry,) = (entry for entry in list_entries() if entry.artifact == before)
        assert checkpoint_state(entry) == "changed"
        artifact = compile_once(str(given))
        assert artifact != before
        before = artifact


def test_a_changed_adapter(model: Path, adapter: Path, compiles: Compiler) -> None:
    first = compile_once(str(model), adapters=["adapter"])
    assert compile_once(str(model), adapters=[str(adapter)]) == first
    grow(adapter)
    assert compile_once(str(model), adapters=["adapter"]) != first


def test_another_target_or_variant(
    compiles: Compiler, this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ({}, {"name": "other"}, {"variant": "other"})
    for change in changes:
        other = dataclasses.replace(this_machine, **change)  # type: ignore[arg-type]
        monkeypatch.setattr(
            "osscompile.cache.compile_once.target_here", lambda name, other=other: other
        )
        compile_once("nano")
    assert len(compiles.calls) == 3


@pytest.mark.parametrize("what", ["__version__", "FORMAT_VERSION", "code"])
def test_another_version(
    what: str, compiles: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That of a checkout stays while its code changes."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(facts, "PACKAGES", ("package",))
    facts.compiler_digest.cache_clear()
    try:
        first = compile_once("nano")
        facts.compiler_digest.cache_clear()
        assert compile_once("nano") == first
        if what == "code":
            (package / "constants.json").write_text("{}")
        else:
            monkeypatch.setattr(facts, what, "9.9")
        facts.compiler_digest.cache_clear()
        assert compile_once("nano") != first
    finally:
        monkeypatch.undo()
        facts.compiler_digest.cache_clear()


def test_records_of_the_user(compiles: Compiler, this_machine: Target) -> None:
    first = compile_once("nano")
    records = user_records_file(this_machine)
    assert records is not None
    records.parent.mkdir(parents=True)
    records.write_text("{}")
    assert compile_once("nano") != first


def test_what_is_stale_is_told_with_its_size(
    model: Path, compiles: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compile_once(str(model)).parent
    os.utime(first / entries.FACTS, (0, 0))
    touch(model)
    compile_once(str(model))
    told = f"{first.name} (0.00 GB) is of an older checkpoint or version: `osscompile rm --stale`"
    assert told in capsys.readouterr().err
    assert [entry.folder for entry in stale_entries(list_entries())] == [first]


def test_what_came_back_is_not_stale(model: Path, compiles: Compiler) -> None:
    first = compile_once(str(model))
    before = (model / "config.json").stat()
    os.utime(model / "config.json", (0, 0))
    second = compile_once(str(model))
    os.utime(second.parent / entries.FACTS, (1, 1))
    os.utime(model / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert compile_once(str(model)) == first
    assert [entry.artifact for entry in stale_entries(list_entries())] == [second]


def test_a_damaged_checkpoint_is_not_replaced_by_what_was(model: Path, compiles: Compiler) -> None:
    compile_once(str(model))
    grow(model)
    compiles.error = CheckpointError("damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        compile_once(str(model))


@pytest.mark.parametrize("error", [CompileError("no linker"), KeyboardInterrupt()])
def test_a_compile_that_fails_leaves_nothing(
    error: BaseException, compiles: Compiler, cache: Path
) -> None:
    compiles.error = error
    with pytest.raises(type(error)):
        compile_once("nano")
    assert listing(cache) == []


# Where it cannot be written


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none", "x" * 300])
def test_a_cache_that_cannot_be_written(
    place: str, compiles: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("mine")
    monkeypatch.setenv(entries.CACHE, place)
    with pytest.raises(CompileError, match=r"expected a (cache|folder) that can be .* set OSSCOMP"):
        compile_once("nano")
    assert Path("file").read_text() == "mine" and os.listdir() == ["file"]


def test_too_little_room(compiles: Compiler, cache: Path) -> None:
    compiles.error = PlaceError(f"{cache}: needs 12 GB, found 1 GB", "choose another -o")
    with pytest.raises(CompileError) as caught:
        compile_once("nano")
    message = str(caught.value)
    assert message.startswith(f"{cache}: needs 12 GB") and "another -o" not in message
    assert "`osscompile rm`" in message and "set OSSCOMPILE_CACHE" in message
