"""Places that a user may not look into, and names that cannot be: each is told as what it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

import osscompile
from osscompile import cli
from osscompile.importer.synthetic import TINY
from osscompile.runtime import ArtifactError, OsscompileError
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.devices.tvm_runtime import find_runtime_library
from osscompile.runtime.trials.files import kernel_folders

NOBODY = 65534


@pytest.fixture
def closed(nano_artifact: Path) -> Iterator[Path]:
    """A folder with an artifact and a checkpoint, which this process may not look into."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give up its rights")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder, "closed")
        shutil.copytree(nano_artifact, closed / "nano.osc")
        write_checkpoint(closed / "m", TINY)
        (closed / "m.gguf").write_bytes(b"GGUF")
        os.chmod(closed, 0o700)
        with as_nobody():
            yield closed


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Take away this process's rights to files."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


CALLS: dict[str, Callable[[Path], object]] = {
    "compile the folder": lambda closed: osscompile.compile(closed),
    "compile in it": lambda closed: osscompile.compile(closed / "m"),
    "compile a file in it": lambda closed: osscompile.compile(closed / "m.gguf"),
    "adapter": lambda closed: osscompile.compile("nano", adapters=closed / "m"),
    "load the folder": lambda closed: osscompile.load(closed),
    "load in it": lambda closed: osscompile.load(closed / "nano.osc"),
    "inspect": lambda closed: read_manifest(closed / "nano.osc"),
    "measure": kernel_folders,
}


@pytest.mark.parametrize("call", CALLS)
def test_folder_that_may_not_be_read(closed: Path, call: str) -> None:
    message = r"expected .*, found.*: \[Errno 13\] Permission denied.*; "
    with pytest.raises(OsscompileError, match=message):
        CALLS[call](closed)


@pytest.mark.parametrize("command", [["run"], ["inspect"], ["bench"], ["tune", "--measure"]])
@pytest.mark.parametrize("name", ["", "nano.osc"])
def test_commands_for_what_may_not_be_read(
    closed: Path, command: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = ["hello"] if command == ["run"] else []
    assert cli.main([*command, str(closed / name), *last]) == 1
    error = capsys.readouterr().err
    assert "expected" in error and "Permission denied" in error and "damaged" not in error


def test_manifest_that_may_not_be_read(closed: Path) -> None:
    """It may be whole."""
    with contextlib.ExitStack() as stack:
        os.seteuid(0)
        stack.callback(os.seteuid, NOBODY)
        os.chmod(closed, 0o755)
        os.chmod(closed / "nano.osc" / "manifest.json", 0o600)
    with pytest.raises(ArtifactError, match=r"files that cannot be read: .*manifest\.json") as e:
        osscompile.load(closed / "nano.osc")
    assert "damaged" not in str(e.value)


def test_runtime_library_in_such_a_folder(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSSCOMPILE_TVM_RUNTIME", str(closed / "libtvm_runtime.so"))
    with pytest.raises(ArtifactError, match="OSSCOMPILE_TVM_RUNTIME: expected the path of libtvm"):
        find_runtime_library()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\0b"], ids=["300", "5000", "zero"])
def test_name_that_cannot_be(name: str) -> None:
    for call in (osscompile.load, osscompile.compile, lambda name: kernel_folders(Path(name))):
        with pytest.raises(OsscompileError, match="expected "):
            call(name)


def test_folder_of_one_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense-0").mkdir()
    (tmp_path / "dense-0" / "plan.json").write_text("{}")
    assert kernel_folders(tmp_path) == [tmp_path / "dense-0"]
    assert cli.main(["tune", "--measure", str(tmp_path / "dense-0")]) == 1
    assert "found the one of a kernel; give the folder above it" in capsys.readouterr().err
    with pytest.raises(OsscompileError, match="give the folder above it"):
        kernel_folders(tmp_path / "dense-0")
