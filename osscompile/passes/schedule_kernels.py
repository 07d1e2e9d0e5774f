"""Replace every kernel by its schedule for the target."""

from tvm import ir
from tvm.tirx import PrimFunc

from ..schedules.records import Records, recorded
from ..schedules.rule import schedule
from ..targets import Target


def schedule_kernels(
    module: ir.IRModule, target: Target, records: Records | None = None
) -> ir.IRModule:
    """`records`: of constants; default: the committed ones."""
    scheduled = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc):
            function = schedule(function, target, recorded(function, target, records))
        scheduled[name] = function
    return scheduled
