"""Constants that tuning found, one JSON file per variant; kernels without a record use defaults.

A record's key is the kernel's operation and the shapes of its parameters, for example
"dense_q8 int8[1,90,32] float32[1,90] ... uint32[640,90,8,8] ...": the same in every layer of a
model. Shapes are those after weights were packed.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

from tvm import tirx
from tvm.tirx import PrimFunc

from ..targets import Target

# A schedule asks for a constant: its name, the candidates, and the default, which is safe untuned.
# Tuning answers with a candidate to measure, a compile with what tuning found.
Choose: TypeAlias = Callable[[str, Sequence[int], int], int]


def recorded(function: PrimFunc, target: Target) -> Choose:
    """Answer from the record of this kernel on this target, else with the default."""
    return answering(load_records(target).get(kernel_key(function), {}))


def answering(record: dict[str, int]) -> Choose:
    """Answer from a record where its value is a candidate, else with the default."""

    def choose(name: str, candidates: Sequence[int], default: int) -> int:
        assert default in candidates, (name, default, candidates)
        value = record.get(name, default)
        return value if value in candidates else default  # else an older schedule's

    return choose


def kernel_key(function: PrimFunc) -> str:
    """Return operation, dtypes and shapes; symbolic extents print as n."""
    parameters = []
    for parameter in function.params:
        extents = (str(e.value) if isinstance(e, tirx.IntImm) else "n" for e in parameter.shape)
        parameters.append(f"{parameter.dtype}[{','.join(extents)}]")
    return " ".join([str(function.attrs["op"]), *parameters])


def load_records(target: Target) -> dict[str, dict[str, int]]:
    """Return the constants by kernel; none if the variant was not tuned."""
    return _records(records_file(target))


def records_file(target: Target) -> Path:
    """Return the file of a variant's records; without it a compile takes the defaults."""
    name = target.name if target.variant == target.name else f"{target.name}-{target.variant}"
    return Path(__file__).parent / "records" / f"{name}.json"


@cache
def _records(path: Path) -> dict[str, dict[str, int]]:
    if not path.exists():
        return {}
    records: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8"))
    return records
