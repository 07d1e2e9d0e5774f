"""Use float16 for storage only: bits in memory, float32 in expressions.

Arithmetic on halves is an extension of OpenCL C that not every device has; functions that convert
halves are not. `codegen/opencl.py` defines the functions that are called here.
"""

from tvm import ir, tirx
from tvm.ir import Expr
from tvm.tirx import Cast, PrimFunc, Var
from tvm_ffi import structural_map

from ..targets import Target

HALF_TO_FLOAT = "half_to_float"  # uint16 bits -> float32
FLOAT_TO_HALF = "float_to_half"  # float32 -> uint16 bits, rounded to the nearest, ties to even


def store_halves(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Rewrite the kernels of `module` so that their float16 parameters become uint16. Where the
    device computes with float16, nothing changes."""
    if target.has_half:
        return module
    rewritten = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        rewritten[name] = _rewrite(function) if isinstance(function, PrimFunc) else function
    return rewritten


def _rewrite(kernel: PrimFunc) -> PrimFunc:
    """Convert halves as soon as they are loaded, and just before they are stored."""
    bits_of = {
        parameter: tirx.decl_buffer(parameter.shape, "uint16", parameter.name)
        for parameter in kernel.params
        if str(parameter.dtype) == "float16"
    }
    buffers = set(bits_of.values())

    def load(value: ir.TensorLoad) -> Expr:
        if value.source not in buffers:
            return value
        bits = tirx.BufferLoad(value.source, value.indices)
        return tirx.call_pure_extern("float32", HALF_TO_FLOAT, bits)

    def cast(value: Cast) -> Expr:
        if str(value.ty) == "float16":
            return tirx.call_pure_extern("uint16", FLOAT_TO_HALF, value.value)
        return value.value if str(value.ty) == str(value.value.ty) else value

    if not bits_of:
        return kernel
    renames = (Var, lambda variable: bits_of.get(variable, variable))
    return structural_map(kernel, [renames, (ir.TensorLoad, load), (Cast, cast)])
