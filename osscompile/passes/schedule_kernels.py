"""Replace every kernel by its schedule for the target."""

from tvm import ir
from tvm.tirx import PrimFunc

from ..schedules.rule import schedule
from ..targets import Target


def schedule_kernels(module: ir.IRModule, target: Target) -> ir.IRModule:
    scheduled = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        scheduled[name] = schedule(function, target) if isinstance(function, PrimFunc) else function
    return scheduled
