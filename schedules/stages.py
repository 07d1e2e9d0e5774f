"""Read the expressions of a kernel's stages, for schedules that compute them in their own loops."""

from collections.abc import Callable, Mapping, Sequence

from tvm.ir import Expr, TensorLoad
from tvm.s_tir import SBlock, Schedule
from tvm.tirx import PrimFunc, Var
from tvm_ffi import structural_map

Load = Callable[[Sequence[Expr]], Expr]  # the value of a stage at these indices


def always(value: Expr) -> Load:
    """Answer with the same value for all indices."""
    return lambda indices: value


class Stages:
    """The stages of a kernel made of blocks; the second of a name has `_1` behind it."""

    def __init__(self, function: PrimFunc) -> None:
        sch = Schedule(function)
        stages = [sch.get(block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
        self._stages: dict[str, SBlock] = {}
        for stage in stages:
            again = f"{stage.name_hint}_1" if stage.name_hint in self._stages else stage.name_hint
            self._stages[again] = stage

    def value(self, name: str, at: Sequence[Expr], loads: Mapping[str, Load]) -> Expr:
        """Return what a stage that is no sum has at these indices; `loads` answers for what it
        reads of other stages."""
        stage = self._stages[name]
        variables = [axis.var for axis in stage.iter_vars]
        replaced = dict(zip(variables, at, strict=True))

        def load(read: TensorLoad) -> Expr:
            known = loads.get(read.source.name)
            return read if known is None else known(read.indices)

        names = (Var, lambda variable: replaced.get(variable, variable))
        value: Expr = structural_map(stage.body.value, [names, (TensorLoad, load)])
        return value
