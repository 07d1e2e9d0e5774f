"""`run MODEL` compiles what it has not compiled yet, once, and what has changed again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cached import Compiler
from cached import cache as cache  # fixtures
from cached import compiles as compiles
from checkpoints import write_checkpoint

from osscompile import CheckpointError, CompileError
from osscompile.cache import entries, facts
from osscompile.cache.compile_once import compile_once
from osscompile.cache.entries import list_entries, stale_entries
from osscompile.errors import AbsentError, PlaceError
from osscompile.importer import resolve
from osscompile.importer.synthetic import TINY
from osscompile.schedules.records import user_records_file
from osscompile.targets import Target


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "my model", TINY)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(8))
    return folder


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
    os.utime(first / "artifact" / "manifest.json", (0, 0))
    touch(model)
    compile_once(str(model))
    told = f"{first.name} (0.00 GB) is of an older checkpoint or version: `osscompile rm --stale`"
    assert told in capsys.readouterr().err
    assert [entry.folder for entry in stale_entries(list_entries())] == [first]


# Not at all


def test_a_model_that_is_gone_is_run_as_it_was(
    model: Path, compiles: Compiler, this_machine: Target
) -> None:
    first = compile_once("./my model", adapters=[])
    model.rename(model.with_name("other"))
    with pytest.warns(UserWarning, match=r"my model: no such model.*; taken is what was compiled"):
        assert compile_once("my model") == first
    with pytest.raises(AbsentError, match="no such model"):
        compile_once("my model", profile="exact")


def test_an_adapter_that_is_gone(model: Path, adapter: Path, compiles: Compiler) -> None:
    first = compile_once(str(model), adapters=["adapter"])
    adapter.rename(adapter.with_name("other"))
    with pytest.warns(UserWarning, match="expected the folder of an adapter, found none; taken"):
        assert compile_once(str(model), adapters=["adapter"]) == first


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


# Hugging Face


class Hub:
    """Stands for `snapshot_download`: a cache with one revision, and a newer one to fetch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cached: str | None = None
        self.newest: str | None = "1" * 40  # None: not reachable
        self.online = 0

    def __call__(self, repo_id: str, local_files_only: bool = False, **patterns: Any) -> str:
        if not local_files_only:
            self.online += 1
            self.cached = self.newest or self.cached
        if self.cached is None:
            raise FileNotFoundError("not in the cache, not reachable")
        return str(self.folder / self.cached)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(resolve, "snapshot_download", hub)
    return hub


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
    with pytest.warns(UserWarning, match=r"org/model: .* found nothing of it; taken is what was"):
        assert compile_once("org/model") == first
    assert hub.online == asked


def test_an_id_whose_newer_commit_cannot_be_fetched(hub: Hub, compiles: Compiler) -> None:
    first = compile_once("org/model")
    hub.newest = hub.cached = "2" * 40
    compiles.error = AbsentError("org/model: its download failed")
    with pytest.warns(UserWarning, match=r"its download failed; taken is what was compiled of it"):
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


# Two processes

COMPILE_SLOWLY = """
import sys, time, types
from pathlib import Path
module = types.ModuleType("osscompile.compiler")  # the real one imports TVM

def compile(model, target, output, **options):
    print("compiling", flush=True)
    while not Path("go").exists():
        time.sleep(0.01)
    output.mkdir()
    (output / "manifest.json").write_text("{}")

module.compile = compile
sys.modules[module.__name__] = module
from osscompile.cache.compile_once import compile_once
print(compile_once("nano"), flush=True)
"""


@pytest.fixture
def start(cache: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start processes that compile until there is a file `go`."""
    processes = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMPILE_SLOWLY]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def line(stream: Any) -> str:
    return str(stream.readline())


def test_the_second_process_waits_for_the_first(start: Callable[[], Any], cache: Path) -> None:
    first = start()
    assert line(first.stdout) == "compiling\n"
    (entry,) = list_entries()
    assert stale_entries([entry]) == []
    second = start()
    assert line(second.stderr) == f"another process compiles {entry.name}: waiting for it\n"
    Path("go").touch()
    artifact = f"{entry.artifact}\n"
    assert line(first.stdout) == artifact and line(second.stdout) == artifact
    assert (first.wait(), second.wait()) == (0, 0)
    assert listing(cache) == [entry.name]


def test_a_killed_process_keeps_nobody_waiting(start: Callable[[], Any], cache: Path) -> None:
    first = start()
    assert line(first.stdout) == "compiling\n"
    second = start()
    assert "waiting" in line(second.stderr)
    first.send_signal(signal.SIGKILL)
    assert line(second.stdout) == "compiling\n"
    second.send_signal(signal.SIGKILL)
    second.wait()
    (entry,) = list_entries()
    assert stale_entries([entry]) == [entry] and not entry.is_whole()
    Path("go").touch()
    assert line(start().stdout) == "compiling\n"
