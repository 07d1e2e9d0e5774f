"""All that decides what an artifact is: two with the same facts are the same artifact."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ..runtime.manifest import FORMAT_VERSION
from ..runtime.version import __version__
from ..schedules.records import user_records_file
from ..targets import Target
from .origin import Origin

# What compiles. Of the runtime only the format matters, which has a version.
PACKAGES = ("osscompile", "osscompile.schedules", "osscompile.targets")
CODE_SUFFIXES = (".py", ".json", ".toml")
DIGITS = 8  # of the digest, in a name
MOST_READABLE = 100  # characters before them; a file's name may have 255 bytes


@dataclass(frozen=True)
class Facts:
    """`model`, `adapters` and `state`: see Origin. `records`, the user's own of tuning, and
    `compiler`, whose package holds the others, are digests."""

    model: str
    adapters: tuple[str, ...]
    target: str
    variant: str
    profile: str
    state: str
    records: str
    compiler: str

    @property
    def request(self) -> tuple[object, ...]:
        """What a user asks for, in whatever state it is."""
        return self.model, self.adapters, self.target, self.variant, self.profile

    def entry_name(self, name: str) -> str:
        """A name for a folder: of the model, the target, the profile, and a digest of all."""
        digest = _digest([json.dumps(asdict(self)).encode()])[:DIGITS]
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", f"{name}-{self.target}-{self.profile}")
        return f"{readable[:MOST_READABLE]}-{digest}".lstrip("-.")


def facts_of(origin: Origin, target: Target, profile: str) -> Facts:
    """For a compile now, of what is in a known state."""
    assert origin.state is not None
    records = user_records_file(target)
    found = [records.read_bytes()] if records is not None and records.is_file() else []
    return Facts(
        origin.model,
        origin.adapters,
        target.name,
        target.variant,
        profile,
        origin.state,
        _digest(found),
        compiler_digest(),
    )


@cache
def compiler_digest() -> str:
    """Hash of the version and of the code, which changes in a checkout while the version stays."""
    parts = [__version__.encode(), str(FORMAT_VERSION).encode()]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        files = sorted(Path(spec.origin).parent.rglob("*"))
        parts += [file.read_bytes() for file in files if file.suffix in CODE_SUFFIXES]
    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())  # so that it counts where one ends
    return total.hexdigest()
