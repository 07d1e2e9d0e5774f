"""Constants that tuning found, one JSON file per variant; kernels without a record use defaults.

A record's key is the kernel's operation and the shapes of its parameters, for example
"dense_q8 int8[1,90,32] float32[1,90] ... uint32[640,90,8,8] ...": the same in every layer of a
model. Shapes are those after weights were packed.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..targets import Target

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

# A schedule asks for a constant: its name, the candidates, and the default, which is safe untuned.
# Tuning answers with a candidate to measure, a compile with what tuning found.
Choose: TypeAlias = Callable[[str, Sequence[int], int], int]


Records: TypeAlias = Mapping[str, Mapping[str, int]]  # constants by name, by the kernel's key


def recorded(function: "PrimFunc", target: Target, records: Records | None = None) -> Choose:
    """Answer from the record of this kernel in `records` (default: the committed ones of this
    target), else with the default."""
    records = load_records(target) if records is None else records
    return answering(records.get(kernel_key(function), {}))


def answering(record: Mapping[str, int]) -> Choose:
    """Answer from a record where its value is a candidate, else with the default."""

    def choose(name: str, candidates: Sequence[int], default: int) -> int:
        assert default in candidates, (name, default, candidates)
        value = record.get(name, default)
        return value if value in candidates else default  # else an older schedule's

    return choose


def kernel_key(function: "PrimFunc") -> str:
    """Return operation, dtypes and shapes; symbolic extents print as n, or as few."""
    from tvm import tirx  # takes seconds to import, which whoever asks for a file only has not

    from .formats import is_few

    def told(extent: tirx.Expr) -> str:
        if isinstance(extent, tirx.IntImm):
            return str(extent.value)
        return "few" if is_few(extent) else "n"

    parameters = []
    for parameter in function.params:
        extents = map(told, parameter.shape)
        parameters.append(f"{parameter.dtype}[{','.join(extents)}]")
    if window := int(function.attrs.get("window", 0)):  # which no shape tells
        parameters.append(f"window={window}")
    return " ".join([str(function.attrs["op"]), *parameters])


def load_records(target: Target) -> Records:
    """Return the committed constants by kernel; none if the variant was not tuned."""
    return _records(records_file(target))


def records_file(target: Target) -> Path:
    """Return the package's file of a variant's records; without it its kernels take defaults."""
    name = target.name if target.variant == target.name else f"{target.name}-{target.variant}"
    return Path(__file__).parent / "records" / f"{name}.json"


def user_records_file(target: Target) -> Path | None:
    """Where a user keeps the records of a variant who cannot write into the package; None for one
    without a home. Compiles read it after the package's."""
    data = os.path.expanduser(os.environ.get("XDG_DATA_HOME") or "~/.local/share")
    if not os.path.isabs(data):
        return None
    return Path(data, "osscompile", "records", records_file(target).name)


@cache
def _records(path: Path) -> Records:
    if not path.exists():
        return {}
    records: Records = json.loads(path.read_text(encoding="utf-8"))
    return records
