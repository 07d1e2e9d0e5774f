"""What is loaded is what lies on the disk, and what is dropped is gone."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artifacts import VARIANTS_HERE, copy_artifact, flip_byte, library_is_loaded
from random_model import random_model, write_checkpoint

import osscompile
from osscompile.runtime import ArtifactError, load
from osscompile.runtime import model as model_file
from osscompile.runtime.artifact import Artifact, open_artifact, read_manifest
from osscompile.runtime.manifest import TOKENIZER, WEIGHTS

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two artifacts of the same weights and shapes, whose code differs in a constant."""
    folder = tmp_path_factory.mktemp("pair")
    options = {"variants": VARIANTS_HERE, "profile": "exact", "context": 64}
    artifacts = []
    for limit in (7.0, 0.05):
        config, tensors = random_model(layers=2)
        config["swiglu_limit"] = limit
        checkpoint = write_checkpoint(folder / str(limit), config, tensors)
        with warnings.catch_warnings(action="ignore"):  # it has no tokenizer
            artifacts.append(
                osscompile.compile(checkpoint, output=folder / f"{limit}.osc", **options)
            )
    first, second = artifacts
    return first, second


def put_in_place(source: Path, target: Path) -> None:
    """As a compile to the same path does."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def write_over(source: Path, target: Path) -> None:
    """Into the same files."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "in a folder"])
@pytest.mark.parametrize("replace", [put_in_place, write_over])
@pytest.mark.parametrize("kept", [True, False], ids=["first kept", "first dropped"])
def test_other_code_at_the_same_path(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replace: Callable[[Path, Path], None],
    kept: bool,
    in_memory: bool,
) -> None:
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    first, second = (load(path).logits(IDS) for path in pair)
    assert not np.allclose(first, second, rtol=0.1)
    path = copy_artifact(pair[0], tmp_path)
    model = load(path)
    np.testing.assert_array_equal(model.logits(IDS), first)
    if not kept:
        del model
    replace(pair[1], path)
    np.testing.assert_array_equal(load(path).logits(IDS), second)
    if kept and replace is put_in_place:  # else its weights were written over, and are the same
        np.testing.assert_array_equal(model.logits(IDS), first)


def test_library_that_changes_once_it_was_checked(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_artifact(pair[0], tmp_path)

    def open_and_change(*arguments: object) -> Artifact:
        artifact = open_artifact(*arguments)  # type: ignore[arg-type]
        write_over(pair[1], path)
        return artifact

    monkeypatch.setattr(model_file, "open_artifact", open_and_change)
    with pytest.raises(ArtifactError, match=r"expected sha256 .*changed while it was loaded"):
        load(path)
    assert not library_is_loaded(path)


def test_a_model_that_is_dropped_leaves_nothing(pair: tuple[Path, Path]) -> None:
    """No code, no open file, no thread; else every load would cost memory."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's /proc")
    gc.collect()  # what tests before left
    load(pair[0]).logits(IDS)  # what the process has once
    before = resources()
    for path in pair * 10:
        model = load(path)
        model.logits(IDS)
        assert library_is_loaded(path)
        device = weakref.ref(model._runner.device)
        del model
        assert device() is None
        assert not library_is_loaded(path)
    assert resources() == before


def resources() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere code needs a file")
def test_without_a_folder_for_temporary_files(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)
    assert load(pair[0]).logits(IDS).shape[0] == len(IDS)


def test_another_artifact_put_in_its_place_while_it_is_hashed(
    nano_artifact: Path, tmp_path: Path
) -> None:
    """What was hashed is what is loaded, of every file."""
    copy, other = copy_artifact(nano_artifact, tmp_path), tmp_path / "other"
    shutil.copytree(copy, other)
    for name in (WEIGHTS, TOKENIZER):
        flip_byte(other / name, -100)
    left = sum(file.num_bytes for file in read_manifest(copy).files.values())

    def swap(num_bytes: int) -> None:
        nonlocal left
        left -= num_bytes
        if left == 0:
            copy.rename(tmp_path / "before")
            other.rename(copy)

    artifact = open_artifact(copy, progress=swap)
    assert left == 0 and not other.exists()
    expected = open_artifact(tmp_path / "before")
    for found, right in zip(artifact.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(found, right)
    assert artifact.contents.keys() == {TOKENIZER}
    assert artifact.contents == expected.contents
