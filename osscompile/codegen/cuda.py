"""Turn lowered IR into machine code for an NVIDIA GPU, and the programs that launch it.

This needs CUDA's compiler; where the artifact runs, only the driver is needed.
"""

import importlib
import re
import tempfile
from pathlib import Path

import tvm
from tvm import ir
from tvm.target import Target as TvmTarget
from tvm.tirx import PrimFunc
from tvm.tirx import transform as tirx

from ..errors import CompileError
from ..runtime.devices.program import write_programs
from ..runtime.manifest import PROGRAMS_SUFFIX
from ..schedules.gpu.room import ROOM
from ..schedules.gpu.wgmma import SWIZZLE_BYTES
from ..targets import Target
from .programs import build_programs
from .ptx import PRELUDE
from .tools import find_nvcc, run_tool

_GLOBAL = 'extern "C" __global__'  # what a kernel begins with
_NAME = re.compile(r"__launch_bounds__\((\d+)\) (\w+)\(")
_ROOM_CALL = re.compile(rf"\b{ROOM}\((\d+)\);")
_DYNAMIC = "extern __shared__ __align__"  # what TVM writes before the memory that a launch adds


def build_cuda(module: ir.IRModule, target: Target, output: Path) -> None:
    """Write a fat binary as `output`, and beside it the programs that launch its kernels.

    Raises CompileError without CUDA's compiler, or if it fails.
    """
    programs = write_programs(build_programs(module))
    write_cuda(module, target, output)
    output.with_suffix(PROGRAMS_SUFFIX).write_text(programs, encoding="utf-8")


def write_cuda(module: ir.IRModule, target: Target, output: Path) -> None:
    """Write only the kernels' fat binary. Raises CompileError as `build_cuda` does."""
    compile_cuda(cuda_source(module, target), target, output)


def cuda_source(module: ir.IRModule, target: Target) -> str:
    """Return CUDA C++ of all device functions."""
    lower = tvm.transform.Sequential([tirx.StmtSimplify(), tirx.LowerIntrin()])
    # from the module: tvm.tirx has a function of the same name
    codegen_build = importlib.import_module("tvm.tirx.build").codegen_build
    functions = {
        name: function
        for name, function in sorted(module.functions_items(), key=lambda item: item[0].name_hint)
        if isinstance(function, PrimFunc) and "calling_conv" in function.attrs
    }
    built = codegen_build(lower(ir.IRModule(functions)), TvmTarget(target.tvm))
    source = _with_bounds(str(built.inspect_source()))
    # Matrix units see pieces of rows change places by bits of the address.
    return PRELUDE + source.replace(f"{_DYNAMIC}(64)", f"{_DYNAMIC}({SWIZZLE_BYTES})")


def _with_bounds(source: str) -> str:
    """Say how many blocks of each kernel a processor shall have registers for: one, unless the
    kernel asks for room. If one is enough, nvcc does not load late to save registers."""
    rooms = {}
    for kernel in source.split(_GLOBAL):
        name, room = _NAME.search(kernel), _ROOM_CALL.search(kernel)
        if name and room:
            rooms[name[2]] = room[1]

    def bounds(match: re.Match[str]) -> str:
        return f"__launch_bounds__({match[1]}, {rooms.get(match[2], 1)}) {match[2]}("

    return _NAME.sub(bounds, source)


def compile_cuda(source: str, target: Target, output: Path) -> None:
    compiler = find_nvcc()
    if compiler is None:
        raise CompileError(
            f"target {target.name}: expected CUDA's compiler, found no nvcc on the path or under "
            "CUDA_HOME; install the CUDA toolkit, 12.4 or later"
        )
    output = output.absolute()  # nvcc runs in a folder of its own
    # beside the output, where the next compile removes what a killed one leaves
    with tempfile.TemporaryDirectory(dir=output.parent) as workspace:
        file = Path(workspace, "kernels.cu")
        file.write_text(source, encoding="utf-8")
        command = [*nvcc_command(compiler, target), "-o", str(output), str(file)]
        result = run_tool(command, Path(workspace))
    if result.returncode != 0:
        raise CompileError(
            f"compiling {output.name}: expected nvcc to succeed, it ended with status "
            f"{result.returncode} and said: {result.stderr.strip()[-2000:] or 'nothing'}"
        )


def nvcc_command(compiler: str, target: Target) -> list[str]:
    """Return what makes code for the target's architecture alone: `-arch` would also make some for
    an older one, which may lack an instruction."""
    architecture = str(target.tvm["arch"])
    code = f"arch={architecture.replace('sm', 'compute')},code={architecture}"
    return [compiler, "-gencode", code, "-fatbin"]
