"""A cache of a test's own, and compiles in no time."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from osscompile.cache import entries
from osscompile.importer import resolve
from osscompile.importer.synthetic import TINY
from osscompile.runtime.manifest import MANIFEST

compiler = importlib.import_module("osscompile.compiler")


class Compiler:
    """Stands for `compile`: writes a manifest and weights, or copies an artifact, and remembers
    what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.artifact: Path | None = None
        self.error: BaseException | None = None

    def __call__(self, model: str, target: str, output: Path, **options: Any) -> None:
        self.calls.append({"model": model, "target": target, **options})
        if self.error is not None:
            (output.parent / "artifact.partial").mkdir()
            raise self.error
        if self.artifact is not None:
            shutil.copytree(self.artifact, output)
            return
        output.mkdir()
        (output / MANIFEST).write_text("{}")
        (output / "weights.safetensors").write_bytes(bytes(1000))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not there yet."""
    monkeypatch.setenv(entries.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))  # for records of tuning
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "no-store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def compiles(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr(compiler, "compile", stand_in)
    return stand_in


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
