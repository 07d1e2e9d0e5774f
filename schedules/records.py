"""Constants that tuning found, one JSON file a target; kernels without a record use defaults.

A record's key is the kernel's operation and the shapes of its parameters, for example
"dense_q8 int8[1,1,90,32] float32[1,1,90] ... uint32[640,90,8,8] ...": the same in every layer of a
model. Shapes are those after weights were packed.
"""

import json
from functools import cache
from pathlib import Path

from tvm import tirx
from tvm.tirx import PrimFunc

from ..targets import Target


def constants(function: PrimFunc, target: Target, defaults: dict[str, int]) -> dict[str, int]:
    """`defaults`, overridden by the record of this kernel on this target, if there is one."""
    return defaults | _records(target.name).get(kernel_key(function), {})


def kernel_key(function: PrimFunc) -> str:
    """Operation, dtypes and shapes; symbolic extents print as n."""
    parameters = []
    for parameter in function.params:
        extents = (str(e.value) if isinstance(e, tirx.IntImm) else "n" for e in parameter.shape)
        parameters.append(f"{parameter.dtype}[{','.join(extents)}]")
    return " ".join([str(function.attrs["op"]), *parameters])


@cache
def _records(target_name: str) -> dict[str, dict[str, int]]:
    path = Path(__file__).parent / "records" / f"{target_name}.json"
    if not path.exists():
        return {}
    records: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8"))
    return records
