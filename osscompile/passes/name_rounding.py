"""Round to the nearest whole number, ties to even, with the function that the target names."""

from tvm import ir, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from ..targets import Target


def name_rounding(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Replace every `nearbyint` in the kernels of `module` by a call of that function. A target
    without one leaves the choice to TVM."""
    if target.nearest_even is None:
        return module

    def rename(call: ir.Call) -> Expr:
        if isinstance(call.op, ir.Op) and call.op.name == "tirx.nearbyint":
            return tirx.call_pure_extern(str(call.ty), target.nearest_even, *call.args)
        return call

    renamed = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc):
            function = function.with_body(structural_map(function.body, (ir.Call, rename)))
        renamed[name] = function
    return renamed
