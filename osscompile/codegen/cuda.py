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
from ..schedules.gpu import mma, tf32
from ..schedules.gpu.launch_before import WAIT
from ..schedules.gpu.packed_bytes import DOT, SELECT
from ..targets import Target
from .programs import build_programs
from .tools import find_nvcc, run_tool

PRELUDE = f"""\
static __device__ int {DOT}(unsigned a, unsigned b) {{ return __dp4a(int(a), int(b), 0); }}
static __device__ void {mma.MMA}(int* c0, int* c1, int* c2, int* c3, unsigned a0, unsigned a1,
                                   unsigned a2, unsigned a3, unsigned b0, unsigned b1) {{
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+r"(*c0), "+r"(*c1), "+r"(*c2), "+r"(*c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}
static __device__ void {tf32.MMA}(float* c0, float* c1, float* c2, float* c3, unsigned a0,
                                  unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                  unsigned b1) {{
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(*c0), "+f"(*c1), "+f"(*c2), "+f"(*c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}
static __device__ unsigned {SELECT}(unsigned low, unsigned high, unsigned selectors) {{
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
}}
static __device__ void {WAIT}() {{
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}}

"""


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
    # If one block at a time is enough, nvcc does not load late to save registers.
    bounds = (r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)")
    return PRELUDE + re.sub(*bounds, str(built.inspect_source()))


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
        command = [compiler, f"-arch={target.tvm['arch']}", "-fatbin", "-o", str(output), str(file)]
        result = run_tool(command, Path(workspace))
    if result.returncode != 0:
        raise CompileError(
            f"compiling {output.name}: expected nvcc to succeed, it ended with status "
            f"{result.returncode} and said: {result.stderr.strip()[-2000:] or 'nothing'}"
        )
