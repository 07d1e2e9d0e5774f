"""The entries of the cache: find them, say in which state they are, and remove them."""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import AbsentError, CheckpointError, CompileError
from ..locks import is_held, only_holder
from ..options import path_option, shown
from ..runtime.manifest import MANIFEST
from .facts import Facts
from .origin import find_origin, is_named

CACHE = "OSSCOMPILE_CACHE"  # names the folder, if it is not the usual one
FACTS = "entry.json"
ARTIFACT = "artifact"


@dataclass(frozen=True)
class Entry:
    """A folder of the cache; the artifact is in it once it was compiled to the end."""

    folder: Path
    facts: Facts

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def artifact(self) -> Path:
        return self.folder / ARTIFACT

    @property
    def lock_file(self) -> Path:
        return self.folder.with_name(f"{self.name}.lock")

    def is_whole(self) -> bool:
        # os.path, because pathlib raises on names too long and folders that may not be read
        found = os.path.isfile(self.artifact / MANIFEST)
        return found and read_facts(self.folder) == self.facts

    def compiled(self) -> float:
        """When, in seconds since 1970; so is `used`."""
        return (self.artifact / MANIFEST).stat().st_mtime

    def used(self) -> float:
        return (self.folder / FACTS).stat().st_mtime

    def mark_used(self) -> None:
        with contextlib.suppress(OSError):  # in a cache that may only be read
            os.utime(self.folder / FACTS)

    def num_bytes(self) -> int:
        files = (Path(at, name) for at, _, names in os.walk(self.folder) for name in names)
        return sum(file.lstat().st_size for file in files)

    def locked(self, busy: Callable[[], object]) -> AbstractContextManager[None]:
        """For one process at a time, which compiles or removes it; see `only_holder`."""
        return only_holder(self.lock_file, busy)


def cache_folder() -> Path:
    """Where the cache is, or would be. Raises CompileError for a user without a home."""
    if named := os.environ.get(CACHE):
        return path_option(CACHE, os.path.abspath(os.path.expanduser(named)))
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if platform.system() == "Darwin":
        usual = os.path.expanduser("~/Library/Caches")
    if not os.path.isabs(usual):
        raise CompileError(
            f"cache: expected a home folder, found none; set {CACHE} to a folder that can be "
            "written"
        )
    return path_option("cache", os.path.join(usual, "osscompile"))


def list_entries() -> list[Entry]:
    """All that are in the cache, by name, also those whose compile did not end."""
    folder = cache_folder()
    try:
        # A link may lead out of the cache.
        found = [Path(d.path) for d in os.scandir(folder) if d.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CompileError(
            f"{folder}: expected a folder that can be read, found: {error}; set {CACHE} to another"
        ) from error
    known = ((path, read_facts(path)) for path in sorted(found))
    return [Entry(path, facts) for path, facts in known if facts is not None]


def read_facts(folder: Path) -> Facts | None:
    """What an entry was compiled of; None for a folder that is none. What another version wrote is
    an entry too."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        adapters = tuple(map(str, found.pop("adapters", ())))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    names = {field.name for field in fields(Facts)} - {"adapters"}
    return Facts(adapters=adapters, **{name: str(found.get(name, "")) for name in names})


def last_entry(
    model: str, adapters: Sequence[str], target: str, variant: str, profile: str
) -> Entry | None:
    """The whole entry that was used last for these names, in whatever state they were."""
    found = [
        entry
        for entry in list_entries()
        if len(entry.facts.adapters) == len(adapters)
        and all(map(is_named, (entry.facts.model, *entry.facts.adapters), (model, *adapters)))
        and entry.facts.request[2:] == (target, variant, profile)
        and entry.is_whole()
    ]
    return max(found, key=Entry.used, default=None)


def stale_entries(entries: Sequence[Entry]) -> list[Entry]:
    """Those instead of which another is run by now, and those whose compile was cut off."""
    last: dict[tuple[object, ...], float] = {}
    for entry in entries:
        if entry.is_whole():
            request = entry.facts.request
            last[request] = max(last.get(request, 0), entry.used())
    return [
        entry
        for entry in entries
        if (
            entry.used() < last[entry.facts.request]
            if entry.is_whole()
            else not is_held(entry.lock_file)
        )
    ]


def checkpoint_state(entry: Entry) -> str:
    """How what it was compiled of is now: same, changed, damaged or gone."""
    try:
        origin = find_origin(entry.facts.model, entry.facts.adapters)
    except AbsentError:
        return "gone"
    except CheckpointError:
        return "damaged"
    if origin.state is None:
        return "gone"
    return "same" if origin.state == entry.facts.state else "changed"


def choose_entry(name: str) -> Entry:
    """The entry that a name, the beginning of one, or a model's name stands for. Raises
    CompileError if that is none, or several."""
    entries = list_entries()
    found = [entry for entry in entries if entry.name == name] or [
        entry
        for entry in entries
        if name and (entry.name.startswith(name) or is_named(entry.facts.model, name))
    ]
    if len(found) != 1:
        known = ", ".join(shown(entry.name) for entry in found or entries) or "nothing"
        raise CompileError(
            f"{shown(name)!r}: expected the name of one entry of the cache, found "
            f"{len(found) or 'none'} of it; there {'are' if found else 'is'}: {known}"
        )
    return found[0]


def remove_entry(entry: Entry) -> None:
    """Remove it. Raises CompileError while it is compiled, or if it cannot be removed."""

    def refuse() -> None:
        raise CompileError(
            f"{shown(entry.name)}: expected an entry that nobody compiles, found one that is being "
            "compiled; wait for that, or end it"
        )

    try:
        with entry.locked(refuse):
            if entry.artifact.exists():  # first, so that no run finds half of it
                partial = entry.artifact.with_name(f"{ARTIFACT}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                entry.artifact.rename(partial)
            shutil.rmtree(entry.folder)
    except OSError as error:
        raise CompileError(
            f"{entry.folder}: expected a folder that can be removed, found: {error}; check its "
            "permissions"
        ) from error
