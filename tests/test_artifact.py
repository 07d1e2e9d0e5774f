"""A whole artifact: the rename to its name, its contents, and how its weights get into memory."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from artifacts import TINY_OPTIONS, copy_artifact, run_python

import osscompile
from osscompile.errors import CompileError
from osscompile.runtime import artifact as artifact_module
from osscompile.runtime.artifact import (
    ALIGNMENT,
    PADDING,
    mark_verified,
    open_artifact,
    read_manifest,
)
from osscompile.runtime.manifest import MANIFEST, WEIGHTS
from osscompile.runtime.safetensors import read_header
from osscompile.targets import Target
from osscompile.write import staged_directory

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# The rename to its name


def test_nothing_has_the_final_name_before_everything_is_written(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged_directory(output, 0) as folder:
        (folder / MANIFEST).write_text("{}")
        assert not output.exists()
        assert folder.is_relative_to(
            tmp_path / "out.partial"
        )  # the same file system, so that a rename is enough
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}"]


@pytest.mark.parametrize("name", ["out", "new/folders/out"])
def test_failure_leaves_nothing(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        staged_directory(tmp_path / name, 0) as folder,
    ):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert listing(tmp_path) == []


def test_failure_keeps_the_artifact_that_was_to_be_replaced(tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", "first")
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out", 0) as folder:
        (folder / MANIFEST).write_text("second")
        raise KeyboardInterrupt
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}"]
    assert (tmp_path / "out" / MANIFEST).read_text() == "first"


def test_an_artifact_is_replaced(tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", "first")
    (tmp_path / "out" / "lib.so").write_text("first")
    write_artifact(tmp_path / "out", "second")
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}"]
    assert (tmp_path / "out" / MANIFEST).read_text() == "second"


def test_interrupted_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(tmp_path / "out", "first")
    rename, renamed = Path.rename, []

    def rename_once(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path / "out", "second")
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}"]
    assert (tmp_path / "out" / MANIFEST).read_text() == "first"


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The next compile, even one that fails, gives the name back to the old artifact."""
    write_artifact(tmp_path / "out.partial" / "replaced", "first")
    (tmp_path / "out.partial.lock").touch()
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out", 0):
        assert (tmp_path / "out" / MANIFEST).read_text() == "first"
        raise KeyboardInterrupt
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}"]


def test_output_is_a_link_to_an_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "disk" / "real", "first")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    write_artifact(tmp_path / "out", "second")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / MANIFEST).read_text() == "second"
    assert listing(tmp_path / "disk") == ["real", f"real/{MANIFEST}"]


def test_output_is_the_empty_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_artifact(Path("."), "first")
    assert listing(tmp_path) == ["here", f"here/{MANIFEST}"]


def test_second_writer_of_one_output_is_refused(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out", 0) as folder:
        with (
            pytest.raises(CompileError, match=r"another compile .* choose another -o"),
            staged_directory(tmp_path / "out", 0),
        ):
            pass
        (folder / MANIFEST).write_text("first")  # the refused one touched nothing of the first
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}"]


def test_lock_file_removed_while_another_compile_opened_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a file that nobody can find any more guards nothing: it must be taken again."""
    lock_path, open_path = tmp_path / "out.partial.lock", Path.open
    opened = []

    def open_then_lose(self: Path, *arguments: str) -> object:
        stream = open_path(self, *arguments)
        if self == lock_path:
            opened.append(stream)
            if len(opened) == 1:
                self.unlink()
        return stream

    monkeypatch.setattr(Path, "open", open_then_lose)
    with staged_directory(tmp_path / "out", 0):
        assert len(opened) == 2
        with pytest.raises(CompileError), staged_directory(tmp_path / "out", 0):
            pass


# Its contents


def test_compiled_twice_is_byte_identical(
    tiny_artifact: Path, this_machine: Target, tmp_path: Path
) -> None:
    """Process, folder, order of hashes and temporary folder do not matter, nor does an empty PATH:
    the linker comes with the package ziglang."""
    (tmp_path / "temporary").mkdir()
    run_python(
        "import sys, osscompile; osscompile.compile('synthetic:tiny', sys.argv[1], 'other/name.osc'"
        f", **{TINY_OPTIONS})",
        this_machine.name,
        cwd=tmp_path,
        env={"PYTHONHASHSEED": "1", "TMPDIR": str(tmp_path / "temporary"), "PATH": ""},
    )
    again = tmp_path / "other" / "name.osc"
    assert listing(again) == listing(tiny_artifact)
    for name in listing(again):
        assert (again / name).read_bytes() == (tiny_artifact / name).read_bytes(), name
    assert listing(tmp_path / "temporary") == []
    assert listing(tmp_path / "other") == ["name.osc", *(f"name.osc/{n}" for n in listing(again))]


def test_library_names_no_folder_of_this_machine(tiny_artifact: Path, this_machine: Target) -> None:
    library = (tiny_artifact / this_machine.library).read_bytes()
    folders = (tiny_artifact.parent.parent, Path(osscompile.__file__).parent.parent, Path.home())
    assert not [str(folder) for folder in folders if str(folder).encode() in library]
    assert not re.search(rb"/tmp/|[.]partial|site-packages", library)


def test_manifest_has_size_and_hash_of_every_other_file(nano_artifact: Path) -> None:
    manifest = read_manifest(nano_artifact)
    assert sorted([*manifest.files, MANIFEST]) == listing(nano_artifact)
    for name, file in manifest.files.items():
        content = (nano_artifact / name).read_bytes()
        assert file.num_bytes == len(content)
        assert file.sha256 == hashlib.sha256(content).hexdigest()


def test_every_weight_begins_at_a_multiple_of_64_bytes(nano_artifact: Path) -> None:
    entries = read_header(nano_artifact / WEIGHTS)
    tensors = {name: e for name, e in entries.items() if not name.startswith(PADDING)}
    assert [w.name for w in read_manifest(nano_artifact).weights] == list(tensors)
    assert all(entry.offset % 64 == 0 for entry in tensors.values())
    weights = open_artifact(nano_artifact).weights
    assert all(w.ctypes.data % ALIGNMENT == 0 for w in weights)


def test_a_copy_is_an_artifact_too(nano_artifact: Path, tmp_path: Path) -> None:
    copy = copy_artifact(nano_artifact, tmp_path)
    link = tmp_path / "link"
    link.symlink_to(copy)
    ids = [1, 2, 3]
    expected = osscompile.load(nano_artifact).logits(ids)
    np.testing.assert_array_equal(osscompile.load(copy).logits(ids), expected)
    np.testing.assert_array_equal(osscompile.load(link).logits(ids), expected)


def test_artifact_by_a_relative_path(
    nano_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_artifact(nano_artifact, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert osscompile.load("copy.osc").logits([1]).shape[0] == 1


# Its weights in memory

MEMORY_OF_WEIGHTS = """
import sys
from osscompile.runtime import load

def show():
    inside = False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            inside = line.rstrip().endswith("weights.safetensors")
        elif inside and line.split(":")[0] in ("Size", "Rss", "Private_Dirty", "Shared_Dirty"):
            print(line.split(":")[0], line.split()[1])

model = load(sys.argv[1])
show()
print("run")
list(model.generate(range(20), max_tokens=20))
model.logits(range(20))
show()
"""


@linux
def test_weights_are_mapped_not_read_or_copied(nano_artifact: Path, tmp_path: Path) -> None:
    """One mapping holds the whole file. A load touches no page of it, a run writes to none."""
    output = run_python(MEMORY_OF_WEIGHTS, nano_artifact, cwd=tmp_path).stdout
    after_load, after_run = (
        {line.split()[0]: int(line.split()[1]) for line in part.strip().splitlines()}
        for part in output.split("run\n")
    )
    size = (nano_artifact / WEIGHTS).stat().st_size
    assert after_load == {"Size": -(-size // 4096) * 4, "Rss": 0} | dict.fromkeys(
        ("Private_Dirty", "Shared_Dirty"), 0
    )
    assert after_run["Rss"] > 0  # the device computes with the mapped pages, not with a copy
    assert after_run["Private_Dirty"] == after_run["Shared_Dirty"] == 0


def test_large_file_is_hashed_once_a_copy(
    nano_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "ALWAYS_HASHED_BYTES", 2 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = copy_artifact(nano_artifact, tmp_path)
    files = read_manifest(copy).files
    weights, everything = files[WEIGHTS].num_bytes, sum(f.num_bytes for f in files.values())
    assert weights > 2 << 20 > everything - weights

    def hashed(path: Path, verify: bool = False) -> int:
        counts: list[int] = []
        open_artifact(path, verify, counts.append)
        return sum(counts)

    assert hashed(copy) == everything  # not yet known
    assert hashed(copy) == everything - weights
    assert hashed(copy, verify=True) == everything
    os.utime(copy / WEIGHTS)
    assert hashed(copy) == everything  # it may have changed
    moved = shutil.copytree(copy, tmp_path / "second.osc")
    assert hashed(moved) == everything  # a copy can go wrong
    assert hashed(moved) == everything - weights


@pytest.mark.parametrize("cache", ["/proc/no/such/folder", "relative"])
def test_no_place_to_remember_hashes(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setattr(artifact_module, "ALWAYS_HASHED_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.chdir(tmp_path)
    open_artifact(tiny_artifact)
    assert listing(tmp_path) == []


def test_small_file_leaves_nothing_in_the_cache(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mark_verified(tiny_artifact / WEIGHTS, read_manifest(tiny_artifact).files[WEIGHTS].sha256)
    open_artifact(tiny_artifact)
    assert listing(tmp_path) == []


def write_artifact(output: Path, manifest: str) -> None:
    """Write something that the writer takes for an artifact."""
    with staged_directory(output, 0) as folder:
        (folder / MANIFEST).write_text(manifest)
