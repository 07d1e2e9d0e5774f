"""Turn the graph into IR that the virtual machine executes, at the end of the pipeline."""

import tvm
from tvm import ir
from tvm.relax import transform

from ..targets import Target

_PASSES = (
    transform.LowerAllocTensor(),
    transform.KillAfterLastUse(),
    transform.LowerRuntimeBuiltin(),
    transform.ComputePrimValue(),
    transform.VMShapeLower(),  # after it, shapes are checked at the entry of each function
    transform.AttachGlobalSymbol(),
)


def lower_graph(module: ir.IRModule, target: Target) -> ir.IRModule:
    return tvm.transform.Sequential(list(_PASSES))(module)
