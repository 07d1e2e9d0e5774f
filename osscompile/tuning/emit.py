"""Build a kernel's candidates into a folder that `runtime/trials/measure.py` can measure."""

import hashlib
from pathlib import Path

import numpy as np
import tvm
from tvm import ir
from tvm.tirx import PrimFunc

from ..codegen.cuda import write_cuda
from ..codegen.library import build_library
from ..codegen.opencl import write_opencl
from ..codegen.programs import kernel_launches
from ..passes.expand_exp import expand_exp
from ..passes.name_rounding import name_rounding
from ..passes.split_launches import split_launches
from ..passes.store_halves import store_halves
from ..passes.wait_for_launches import wait_for_launches
from ..runtime.devices.program import Launches
from ..runtime.devices.tvm_cpu import tensor
from ..runtime.errors import TuningError
from ..runtime.trials.files import (
    CHECKED,
    TIMED,
    Answer,
    Argument,
    Candidate,
    Plan,
    read_plan,
    sha256_of,
    write_answer,
    write_plan,
)
from ..runtime.trials.inputs import checked_inputs
from ..runtime.trials.machines import FUNCTION
from ..targets import Target
from .space import Point, Report, choose_points, name_program
from .workloads import Workload

HOST = {"kind": "llvm"}  # the unscheduled kernel is compiled for it
WRITE_KERNELS = {"opencl": write_opencl, "cuda": write_cuda}  # target's `runtime` -> function


def folder_name(workload: Workload) -> str:
    """Return a name that is always the same for the same kernel."""
    text = workload.function.script(show_meta=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{workload.function.attrs['op']}-{digest[:12]}"


def emit_kernel(
    folder: Path, workload: Workload, target: Target, most: int, report: Report = print
) -> None:
    """Write the plan, the answer and the libraries: the default and up to `most` others.

    Libraries that an earlier plan built are kept. `report` hears of candidates that do not build;
    raises CompileError if the default does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _known_plan(folder)
    known_candidates = {c.library: c for c in known.candidates} if known is not None else {}

    def build(point: Point) -> Candidate:
        file = folder / f"{point.program}{Path(target.library).suffix}"
        built = known_candidates.get(file.name)
        if built is not None and built.sha256 == sha256_of(file):
            return Candidate(file.name, built.sha256, point.constants, built.programs)
        programs = _build(point.function, workload.arguments, target, file)
        return Candidate(file.name, sha256_of(file) or "", point.constants, programs)

    def try_build(point: Point) -> Candidate | None:
        try:
            return build(point)
        except Exception as error:  # LLVM and the linker may raise anything
            report(f"{workload.function.attrs['op']} with {point.constants}: no library: {error}")
            return None

    default, *others = choose_points(workload.function, target, most, report)
    plan = Plan(
        target=target.name,
        variant=target.variant,
        runtime=target.runtime,
        device=target.device,
        system=target.system,
        architecture=target.architecture,
        cpu_features=target.cpu_features,
        key=workload.key,
        arguments=workload.arguments,
        answer=_write_answer(folder, workload, target, known),
        candidates=(build(default), *filter(None, map(try_build, others))),
    )
    write_plan(folder, plan)


def compute_answer(workload: Workload) -> list[np.ndarray]:
    """Return what the unscheduled kernel writes in the checked call, computed on this machine for
    any target."""
    arrays = checked_inputs(workload.arguments)
    module = ir.IRModule({FUNCTION: workload.function.with_attr("global_symbol", FUNCTION)})
    tvm.compile(module, tvm.target.Target(HOST))[FUNCTION](*map(tensor, arrays))
    return [a for a, argument in zip(arrays, workload.arguments, strict=True) if argument.written]


def _write_answer(folder: Path, workload: Workload, target: Target, known: Plan | None) -> Answer:
    text = f"{name_program(workload.function, target)} {workload.arguments!r}"
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.answer"
    sha256 = sha256_of(file)
    if known is None or known.answer != Answer(file.name, sha256 or ""):
        write_answer(file, compute_answer(workload))
        sha256 = sha256_of(file)
    return Answer(file.name, sha256 or "")


def _build(
    function: PrimFunc, arguments: tuple[Argument, ...], target: Target, file: Path
) -> dict[str, Launches] | None:
    """Write a scheduled kernel's library; returns its launches if the runtime makes them."""
    module = ir.IRModule({FUNCTION: function.with_attr("global_symbol", FUNCTION)})
    module = name_rounding(expand_exp(module, target), target)
    write_kernels = WRITE_KERNELS.get(target.runtime)
    if write_kernels is None:
        build_library(module, target, file)
        return None
    module = wait_for_launches(split_launches(store_halves(module, target), target), target)
    write_kernels(module, target, file)
    return {
        CHECKED: kernel_launches(module, FUNCTION, [a.check_shape for a in arguments]),
        TIMED: kernel_launches(module, FUNCTION, [a.shape for a in arguments]),
    }


def _known_plan(folder: Path) -> Plan | None:
    """Read the plan in a folder; None if there is none, or if it is damaged."""
    try:
        return read_plan(folder)
    except TuningError:
        return None
