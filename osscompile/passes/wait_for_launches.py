"""Let every launch begin before the one before it has ended, on targets that can.

A thread waits for the launch before, before it reads what that may have written, and before it
writes anything. Then it lets the next launch begin. So whatever a launch finds when it begins was
left by launches that have ended, but for the one before it. Schedules wait where that is best
(`schedules/gpu/launch_before.py`); here all others do so at once.
"""

from tvm import ir, tirx
from tvm.tirx import PrimFunc
from tvm_ffi import structural_walk

from ..schedules.gpu.launch_before import is_wait, wait_call
from ..targets import Target


def wait_for_launches(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Rewrite the device functions of a module from `split_launches`."""
    if not target.has_dependent_launch:
        return module
    waiting = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        is_kernel = isinstance(function, PrimFunc) and "calling_conv" in function.attrs
        waiting[name] = _wait(function) if is_kernel else function
    return waiting


def _wait(kernel: PrimFunc) -> PrimFunc:
    # Where pointers cannot alias, compilers move loads over the wait in both directions.
    kernel = kernel.with_attr("tirx.noalias", False)
    if waits(kernel):
        return kernel
    return kernel.with_body(tirx.SeqStmt([tirx.Evaluate(wait_call()), kernel.body]))


def waits(kernel: PrimFunc) -> bool:
    found = []
    structural_walk(kernel.body, (ir.Call, lambda call: found.append(is_wait(call))))
    return any(found)
