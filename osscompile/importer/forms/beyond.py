"""Refuse tensors beyond what the config says: a config of fewer layers or experts than a checkpoint
has computes another model, of which nothing would tell."""

import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import CheckpointError
from ...options import shown


def refuse_beyond(
    names: Iterable[str], numbered: re.Pattern[str], count: int, field: str, where: Path
) -> None:
    """Raise CheckpointError if the first group of `numbered`, which finds the start of a name,
    reaches `count`, which `field` of the config says."""
    matches = ((numbered.match(name), name) for name in names)
    found = {int(match[1]): name for match, name in matches if match is not None}
    if found and max(found) >= count:
        name = found[max(found)]
        raise CheckpointError(
            f"{where}: {field}: expected {max(found) + 1}, as tensor {shown(name)} has it, "
            f"found {count}: correct the config, or leave out the tensors that are too many"
        )
