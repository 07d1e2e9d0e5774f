"""Let activations share storage, whose size is fixed by the largest prefill."""

import tvm
from tvm import ir, relax
from tvm.relax import transform
from tvm_ffi import structural_walk

from ..targets import Target

_PASSES = (
    transform.ToNonDataflow(),
    transform.RemovePurityChecking(),
    transform.CallTIRRewrite(),  # turns results into allocations, which the planner sees
    transform.StaticPlanBlockMemory(),
)


WORKSPACE = "workspace_bytes"  # module attribute: {function: bytes of its activations}


def plan_memory(module: ir.IRModule, target: Target) -> ir.IRModule:
    planned = tvm.transform.Sequential(list(_PASSES))(module)
    return planned.with_attr(WORKSPACE, _workspace_bytes(planned))


def _workspace_bytes(module: ir.IRModule) -> dict[str, int]:
    """Return the bytes that each function allocates for activations."""
    totals: dict[str, int] = {}
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            sizes: list[int] = []

            def collect(call: ir.Call, sizes: list[int] = sizes) -> None:
                if call.op == ir.Op.get("relax.memory.alloc_storage"):
                    sizes.append(int(call.args[0].values[0]))

            structural_walk(function.body, (ir.Call, collect))
            totals[name.name_hint] = sum(sizes)
    return totals
