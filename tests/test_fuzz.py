"""A few of the damaged files of fuzz.py, which says how to try a million of each."""

from __future__ import annotations

from pathlib import Path
from random import Random

import fuzz
import pytest
from artifacts import copy_artifact
from fuzz import attempt
from hypothesis import given, settings
from hypothesis import strategies as st


def try_some(what: str, folder: Path, count: int) -> None:
    """The same ones every time."""

    @settings(max_examples=count, derandomize=True, database=None, deadline=None)
    @given(st.randoms(use_true_random=False))
    def one(random: Random) -> None:
        attempt(what, random, folder)

    one()


@pytest.mark.parametrize("what", [what for what in fuzz.TRIES if what != "load"])
def test_damaged_files_are_used_or_refused(what: str, tmp_path: Path) -> None:
    try_some(what, tmp_path, 300)


def test_damaged_manifests_are_loaded_or_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    copy_artifact(tiny_artifact, tmp_path).rename(tmp_path / "tiny.osc")
    try_some("load", tmp_path, 60)


def test_whole_files_are_accepted(tiny_artifact: Path, tmp_path: Path) -> None:
    """Else the others would show nothing."""
    copy_artifact(tiny_artifact, tmp_path).rename(tmp_path / "tiny.osc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "mutate", lambda root, random: None)
        patch.setattr(fuzz, "mutated_bytes", lambda content, random: content)
        assert all(attempt(what, Random(0), tmp_path) for what in fuzz.TRIES)
