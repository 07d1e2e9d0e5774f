"""Replace every kernel by its schedule for the target."""

from tvm import ir
from tvm.tirx import PrimFunc

from ..schedules.records import Records, kernel_key, recorded
from ..schedules.rule import schedule
from ..targets import Target
from ..tuning.watched_records import WatchedRecords


def schedule_kernels(
    module: ir.IRModule, target: Target, records: Records | None = None
) -> ir.IRModule:
    """`records`: of constants; default: the committed ones."""
    scheduled = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc):
            choose = recorded(function, target, records)
            if isinstance(records, WatchedRecords):
                choose = records.watch(kernel_key(function), choose)
            function = schedule(function, target, choose)
        scheduled[name] = function
    return scheduled
