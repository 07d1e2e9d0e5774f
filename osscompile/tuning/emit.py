"""Build the candidates of a kernel into a folder that `runtime/measure.py` can measure."""

import hashlib
from pathlib import Path

from tvm import ir
from tvm.tirx import PrimFunc

from ..build import build_library
from ..passes.expand_exp import expand_exp
from ..runtime.errors import TuningError
from ..runtime.measure import FUNCTION
from ..runtime.trials import Candidate, Plan, hash_library, read_plan, write_plan
from ..targets import Target
from .space import Point, Report, choose_points, name_program
from .workloads import Workload


def folder_name(workload: Workload) -> str:
    digest = hashlib.sha256(workload.key.encode()).hexdigest()
    return f"{workload.function.attrs['op']}-{digest[:12]}"


def emit_kernel(
    folder: Path, workload: Workload, target: Target, most: int, report: Report = print
) -> None:
    """Write the plan and the libraries: the reference, the default, up to `most` others.

    What was built for an earlier plan is kept. `report` hears of candidates that do not build;
    raises CompileError if the reference or the default does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _known_libraries(folder)

    def build(function: PrimFunc, program: str, constants: dict[str, int]) -> Candidate:
        file = folder / f"{program}{Path(target.library).suffix}"
        if known.get(file.name) is None or known[file.name] != hash_library(file):
            module = ir.IRModule({FUNCTION: function.with_attr("global_symbol", FUNCTION)})
            build_library(expand_exp(module, target), target, file)
        return Candidate(file.name, hash_library(file) or "", constants)

    def try_build(point: Point) -> Candidate | None:
        try:
            return build(point.function, point.program, point.constants)
        except Exception as error:  # LLVM's and the linker's are many
            report(f"{workload.function.attrs['op']} with {point.constants}: no library: {error}")
            return None

    default, *others = choose_points(workload.function, target, most, report)
    plan = Plan(
        target=target.name,
        variant=target.variant,
        system=target.system,
        architecture=target.architecture,
        cpu_features=target.cpu_features,
        key=workload.key,
        arguments=workload.arguments,
        reference=build(workload.function, name_program(workload.function, target), {}),
        candidates=(
            build(default.function, default.program, default.constants),
            *filter(None, map(try_build, others)),
        ),
    )
    write_plan(folder, plan)


def _known_libraries(folder: Path) -> dict[str, str]:
    """sha256 by name; none if there is no plan, or a damaged one."""
    try:
        plan = read_plan(folder)
    except TuningError:
        return {}
    return {c.library: c.sha256 for c in (plan.reference, *plan.candidates)}
