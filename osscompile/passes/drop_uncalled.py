"""Drop the kernels that no function calls any more, after a pass that emits others."""

from tvm import ir, relax
from tvm_ffi import structural_walk


def drop_uncalled(module: ir.IRModule) -> ir.IRModule:
    functions = dict(module.functions_items())
    kept: set[ir.GlobalVar] = set()
    for name, function in functions.items():
        if isinstance(function, relax.Function):
            kept.add(name)
            structural_walk(function.body, (ir.GlobalVar, kept.add))
    return ir.IRModule({n: f for n, f in functions.items() if n in kept}, attrs=module.attrs)
