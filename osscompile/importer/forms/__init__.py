"""The forms in which people have the models: a file a form, in the order in which they are tried.

Each recognises its folder or file by names, opens it, and gives the same canonical tensors.
"""

from pathlib import Path
from typing import Protocol

from ...errors import CheckpointError
from ..checkpoint import Opened
from . import adapter, gguf, huggingface, original


class Form(Protocol):
    """What a file of a form has."""

    def recognises(self, path: Path) -> bool:
        """Whether the folder or file is of this form."""

    def open_form(self, path: Path) -> Opened:
        """Open and check it; CheckpointError."""


FORMS: tuple[Form, ...] = (gguf, adapter, original, huggingface)


def open_checkpoint(path: str | Path) -> Opened:
    """Open a checkpoint and check that all of it is there; no weights are read yet.

    Raises CheckpointError naming the file, field or tensor at fault.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory; expected one with a checkpoint")
    if not path.is_dir() and not (path.is_file() and gguf.recognises(path)):
        found = "a file; give its directory" if path.is_file() else "neither"
        raise CheckpointError(f"{path}: expected a directory or a GGUF file, found {found}")
    form = next(form for form in FORMS if form.recognises(path))
    return form.open_form(path)
