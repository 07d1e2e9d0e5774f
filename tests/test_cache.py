"""The cache's folder: `osscompile list` shows what is in it, `osscompile rm` removes it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cached import Compiler, Hub
from cached import cache as cache  # fixtures
from cached import compiles as compiles
from cached import hub as hub
from checkpoints import write_checkpoint

from osscompile import CompileError, cli
from osscompile.cache import entries
from osscompile.cache.compile_once import compile_once
from osscompile.cache.entries import Entry, cache_folder, list_entries, read_facts
from osscompile.importer.synthetic import TINY
from osscompile.locks import is_held

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command -> its status, output and errors."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(argv)
        return status, *capsys.readouterr()

    return run


def entry_of(artifact: Path) -> Entry:
    facts = read_facts(artifact.parent)
    assert facts is not None
    return Entry(artifact.parent, facts)


def make_older(artifact: Path) -> None:
    os.utime(artifact.parent / "entry.json", (0, 0))


# Where it is


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("Linux", {}, "home/.cache/osscompile"),
        ("Linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/osscompile"),
        ("Darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/osscompile"),
        ("Darwin", {"OSSCOMPILE_CACHE": "mine"}, "mine"),
        ("Linux", {"OSSCOMPILE_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/osscompile"),
        ("Linux", {"OSSCOMPILE_CACHE": "~/mine"}, "home/mine"),
    ],
)
def test_folder(
    system: str,
    variables: dict[str, str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("OSSCOMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
        if name in variables:
            value = variables[name]
            absolute = value and not value.startswith("~")
            monkeypatch.setenv(name, str(tmp_path / value) if absolute else value)
    assert cache_folder() == tmp_path / expected


def test_user_without_a_home(cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OSSCOMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for command in (["list"], ["run", "nano", "hello"]):
        status, _, errors = run(*command)
        assert status == 1
        assert "expected a home folder, found none; set OSSCOMPILE_CACHE to a folder" in errors


# list


def test_empty_list(cache: Path, run: Run) -> None:
    assert run("list") == (0, f"0.00 GB in {cache}\n", "")
    assert not cache.exists()


def test_list(
    compiles: Compiler,
    run: Run,
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row for each: what it is, and whether its checkpoint is as it was."""
    models = {name: write_checkpoint(tmp_path / name, TINY) for name in ("new", "old", "gone")}
    for model in models.values():
        make_older(compile_once(str(model)))
    compile_once("org/name")
    compile_once("synthetic:tiny", profile="exact")
    os.utime(models["new"] / "config.json", (0, 0))
    os.utime(models["old"] / "config.json", (0, 0))
    compile_once(str(models["old"]))
    (models["gone"]).rename(tmp_path / "elsewhere")
    hub.cached, asked = None, hub.online
    assert "is of an older checkpoint" in capsys.readouterr().err
    status, shown, errors = run("list")
    assert (status, errors, hub.online) == (0, "", asked)
    head, *rows, total, stale = shown.splitlines()
    assert head.split() == ["name", "target", "profile", "size", "compiled", "used", "checkpoint"]
    ends = [row.split("  ")[-1] for row in rows]
    assert sorted(ends) == sorted(
        [
            f"changed: {models['new']}",
            f"changed: {models['old']} (stale)",
            f"same: {models['old']}",
            f"gone: {models['gone']}",
            "gone: org/name",
            "same: synthetic:tiny",
        ]
    )
    assert total.startswith("0.00 GB in ") and "osscompile rm --stale" in stale
    assert sum("  exact  " in row for row in rows) == 1


def test_list_says_what_another_version_compiled(
    compiles: Compiler, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_once("nano")
    monkeypatch.setattr("osscompile.cache.facts.compiler_digest", lambda: "other")
    assert "same: nano, by another version\n" in run("list")[1]


def test_list_says_what_was_cut_off_or_is_being_compiled(compiles: Compiler, run: Run) -> None:
    entry = entry_of(compile_once("nano"))
    entry.artifact.rename(entry.folder / "artifact.partial")
    assert "  cut off (stale)\n" in run("list")[1]
    with entry.locked(lambda: None):
        assert "  being compiled\n" in run("list")[1]
        status, _, errors = run("rm", entry.name)
        assert status == 1 and "expected an entry that nobody compiles" in errors
        assert run("rm", "--stale") == (0, "", "")
    assert not is_held(entry.lock_file)
    assert run("rm", "--stale")[1] == f"removed {entry.name}, 0.00 GB\n"


@pytest.mark.parametrize("facts", ["", "{", "[]", "7", "null", '{"adapters": 7}', "[" * 100_000])
def test_a_folder_that_is_no_entry(cache: Path, run: Run, facts: str) -> None:
    (cache / "mine").mkdir(parents=True)
    (cache / "mine" / "entry.json").write_text(facts)
    assert list_entries() == []
    status, _, errors = run("rm", "mine")
    assert status == 1 and "found none of it; there is: nothing" in errors
    assert (cache / "mine").exists()


def test_an_entry_of_a_version_that_knows_other_facts(compiles: Compiler, run: Run) -> None:
    """It takes room, and can be removed."""
    entry = entry_of(compile_once("nano"))
    file = entry.folder / "entry.json"
    fields = json.loads(file.read_text())
    del fields["state"]
    file.write_text(json.dumps(fields | {"new": 7, "target": 8}))
    assert "  changed: nano\n" in run("list")[1]
    assert run("rm", "nano")[0] == 0 and list_entries() == []


# rm


def test_remove_by_each_name(compiles: Compiler, run: Run, cache: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", TINY)
    for name in ("", "model-", str(model), "model"):
        artifact = compile_once("model")
        assert run("rm", name or artifact.parent.name)[0] == 0
        assert os.listdir(cache) == []


def test_remove_several(compiles: Compiler, run: Run, cache: Path) -> None:
    names = [compile_once("nano", profile=profile).parent.name for profile in ("fast", "exact")]
    assert run("rm", *names, names[0])[:2] == (
        0,
        "".join(f"removed {name}, 0.00 GB\n" for name in names),
    )
    assert os.listdir(cache) == []


def test_ambiguous_name(compiles: Compiler, run: Run) -> None:
    names = sorted(compile_once("nano", profile=p).parent.name for p in ("fast", "exact"))
    compile_once("synthetic:tiny")
    for name in ("nano", "nano-"):
        status, _, errors = run("rm", name)
        assert status == 1
        assert f"found 2 of it; there are: {', '.join(names)}\n" in errors
    assert len(list_entries()) == 3


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../mine", "../cache", "/", "/etc", "nano/..", "*", "~", "\0", "x" * 5000],
)
def test_name_of_no_entry(name: str, compiles: Compiler, run: Run, tmp_path: Path) -> None:
    """No name is made a path: what there is, is told, and nothing is removed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "entry.json").write_text("{}")
    entry = compile_once("nano").parent
    status, _, errors = run("rm", name)
    assert status == 1
    assert f"found none of it; there is: {entry.name}\n" in errors
    assert entry.exists() and (tmp_path / "mine").exists()


def test_a_link_out_of_the_cache(compiles: Compiler, run: Run, tmp_path: Path) -> None:
    artifact = compile_once("nano")
    outside = tmp_path / "outside"
    shutil.copytree(artifact.parent, outside)
    (artifact.parent.parent / "link").symlink_to(outside)
    shutil.rmtree(artifact)
    artifact.symlink_to(outside / "artifact")
    assert [entry.name for entry in list_entries()] == [artifact.parent.name]
    assert run("rm", "link")[0] == 1
    assert run("rm", "nano")[0] == 0
    assert sorted(path.name for path in outside.rglob("*")) == [
        "artifact",
        "entry.json",
        "manifest.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize(
    "name", ["../x", "..", "a/../../b", "-rf", ".hidden", "a\nb", "\u2603" * 80, "q" * 250, "a b"]
)
def test_model_whose_name_is_no_name_of_a_folder(
    name: str, compiles: Compiler, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a profile, which is refused only when it compiles."""
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    for model, profile in ((name, "fast"), ("nano", name)):
        if model != "nano" and os.path.basename(model) not in ("..", "."):
            Path(model).parent.mkdir(exist_ok=True, parents=True)
            Path(model).mkdir()
        artifact = compile_once(model, profile=profile)
        assert artifact.parent.parent == cache
        assert artifact.parent.name.isascii() and artifact.parent.name.isprintable()
        assert artifact.parent.name[0].isalnum() or artifact.parent.name[0] == "_"
    assert len(list_entries()) == 2


def test_nothing_to_remove(run: Run, cache: Path) -> None:
    status, _, errors = run("rm")
    assert status == 1 and "expected a NAME of `osscompile list`, or --stale" in errors
    assert run("rm", "--stale") == (0, "", "")


def test_removal_that_the_system_refuses(
    compiles: Compiler, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(compile_once("nano"))

    def refuse(path: Path, *_: object, **options: object) -> None:
        if not options:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    status, _, errors = run("rm", "nano")
    assert status == 1 and "expected a folder that can be removed, found: " in errors
    assert not entry.is_whole()  # no run finds half of it
    with pytest.raises(CompileError, match="can be removed"):
        entries.remove_entry(entry)
