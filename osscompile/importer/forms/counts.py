"""Refuse a config of more or fewer layers or experts than the weights have: with fewer it computes
another model, of which nothing would tell."""

import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import CheckpointError
from ...options import shown


def refuse_other_count(
    names: Iterable[str], numbered: re.Pattern[str], count: int, field: str, where: Path
) -> None:
    """Raise CheckpointError if the first group of `numbered`, which finds the start of a name,
    does not end at `count`, which `field` of the config says."""
    matches = ((numbered.match(name), name) for name in names)
    found = {int(match[1]): name for match, name in matches if match is not None}
    if not found or max(found) + 1 == count:
        return
    remedy = "leave out the tensors that are too many"
    if max(found) < count:
        remedy = "download the checkpoint again, if it is incomplete"
    raise CheckpointError(
        f"{shown(where)}: {field}: expected {max(found) + 1}, as tensor "
        f"{shown(found[max(found)])}, the last, has it, found {count}: correct the config, or "
        f"{remedy}"
    )
