"""The code of an artifact: read once, and loaded from a copy that nobody else can change.

The system's loader takes a library that is open for a file of the same name, whatever that file
holds by now. So every library is loaded under a name that no other has.
"""

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArtifactError

NAME_BYTES = 240  # of a file in memory; the system takes 249


def read_library(file: Path, sha256: str | None = None) -> bytes:
    """The content of a library, or of the source that a driver compiles. Raises ArtifactError if it
    cannot be read, or is not what the artifact was checked for."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{file}: expected a library, found: {error}; copy or compile the artifact again"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ArtifactError(
            f"{file}: expected sha256 {sha256}, found {found}; it changed while it was loaded: "
            "load the artifact again"
        )
    return content


@contextlib.contextmanager
def private_copy(content: bytes, file: Path) -> Iterator[str]:
    """A path under which no library was loaded before, for as long as it takes to load it; `file`
    is where debuggers say that it comes from."""
    with contextlib.ExitStack() as stack:
        try:  # in memory: a folder for temporary files may be missing, or forbid code
            name = os.fsencode(file.resolve())[-NAME_BYTES:]
            descriptor = os.memfd_create(os.fsdecode(name))
        except (AttributeError, OSError):  # only Linux has it, and may forbid it
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="osscompile-"))
            path = os.path.join(folder, file.name)
            Path(path).write_bytes(content)
        else:
            stack.callback(os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as stream:
                stream.write(content)
            # Numbers of files are used again; slashes and dots that say nothing make names differ.
            unique = f"{next(_loads):b}".replace("0", "/").replace("1", "./")
            path = f"/proc/self/fd/{unique}{descriptor}"
        yield path


_loads = itertools.count()
