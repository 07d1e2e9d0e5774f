"""Choose the schedule of a kernel: the first rule of the target's family that does not decline."""

from tvm.tirx import PrimFunc

from ..targets import Target, TargetError
from .cpu import CPU_RULES
from .gpu import GPU_RULES
from .records import Choose, recorded

RULES = {"cpu": CPU_RULES, "gpu": GPU_RULES}


def schedule(function: PrimFunc, target: Target, choose: Choose | None = None) -> PrimFunc:
    """Schedule a kernel for `target`; its attribute `scheduled_by` names the rule.

    `choose` answers what the rule leaves open; by default the committed records do.
    """
    if target.family not in RULES:
        raise TargetError(
            f"target {target.name}: expected one of the families {', '.join(RULES)}, "
            f"found {target.family!r}"
        )
    choose = recorded(function, target) if choose is None else choose
    for rule in RULES[target.family]:
        sch = rule(function, target, choose)
        if sch is not None:
            scheduled = sch.mod["main"].with_attr("scheduled_by", rule.__name__)
            return scheduled.without_attr("global_symbol")
    raise AssertionError("the last rule of a family declines nothing")
