"""Write e^x as arithmetic where the target's vectors have no instruction for it.

Otherwise every lane of a vector would call the C library's expf.
"""

from tvm import ir, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from ..targets import Target


def expand_exp(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Replace every float32 `exp` in the kernels of `module`."""
    if target.has_exp:
        return module
    expanded = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc):
            function = function.with_body(structural_map(function.body, (ir.Call, _expand)))
        expanded[name] = function
    return expanded


def _expand(call: ir.Call) -> Expr:
    is_exp = isinstance(call.op, ir.Op) and call.op.name == "tirx.exp"
    if is_exp and str(call.ty) == "float32":
        return exp_float32(call.args[0])
    return call


def exp_float32(x: Expr) -> Expr:
    """Return e^x to 2 units in the last place for x <= 88; e^-87 for x below -87 and for NaN.

    x is split into n ln 2 + rest, |rest| <= 0.35. n becomes the exponent's bits, and a Taylor
    polynomial of degree 7 gives e^rest. ln 2 is taken in two parts (Cody and Waite 1980), so that
    the rest is exact.
    """

    def const(value: float) -> Expr:
        return tirx.const(value, "float32")

    bounded = tirx.Var("bounded", "float32")
    whole = tirx.Var("whole", "float32")
    rest = tirx.Var("rest", "float32")
    power = const(1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        power = power * rest + const(1 / factorial)
    bits = (whole.astype("int32") + tirx.const(127, "int32")) << tirx.const(23, "int32")
    result = power * tirx.reinterpret("float32", bits)
    exact_rest = bounded - whole * const(0.693359375) + whole * const(2.12194440e-4)
    result = tirx.Let(rest, exact_rest, result)
    result = tirx.Let(whole, tirx.floor(bounded * const(1.44269504) + const(0.5)), result)
    return tirx.Let(bounded, tirx.max(x, const(-87.0)), result)
