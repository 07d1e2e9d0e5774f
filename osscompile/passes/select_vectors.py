"""Choose between whole vectors by one condition.

TVM makes a vector of equal conditions of it, which its CUDA source cannot name.
"""

import tvm
from tvm import ir, tirx
from tvm.tirx import PrimFunc, Select
from tvm_ffi import structural_map


def _rewrite(kernel: PrimFunc, module: ir.IRModule, context: tvm.transform.PassContext) -> PrimFunc:
    return structural_map(kernel, (Select, _select))


def _select(value: Select) -> ir.Expr:
    condition = value.condition
    if not isinstance(condition, tirx.Broadcast):
        return value
    return tirx.if_then_else(condition.value, value.true_value, value.false_value)


select_vectors = tirx.transform.prim_func_pass(_rewrite, opt_level=0, name="select_vectors")
