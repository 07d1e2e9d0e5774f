"""Turn lowered IR into the two files with which the runtime drives an OpenCL device."""

import importlib
import re
from pathlib import Path

import tvm
from tvm import ir
from tvm.target import Target as TvmTarget
from tvm.tirx import PrimFunc
from tvm.tirx import transform as tirx

from ..passes.store_halves import FLOAT_TO_HALF, HALF_TO_FLOAT
from ..runtime.devices.program import write_programs
from ..runtime.manifest import PROGRAMS_SUFFIX
from ..schedules.gpu.packed_bytes import DOT
from ..schedules.gpu.texture import TEXEL
from ..targets import Target
from .programs import build_programs

IMAGE = "__read_only image1d_buffer_t"

# The functions take values, not pointers, so that any memory may hold the half.
PRELUDE = f"""\
static float {HALF_TO_FLOAT}(ushort bits) {{ return vload_half(0, (const half *)&bits); }}
static ushort {FLOAT_TO_HALF}(float x) {{
  ushort bits;
  vstore_half_rte(x, 0, (half *)&bits);
  return bits;
}}
static int {DOT}(uint a, uint b) {{
#ifdef __opencl_c_integer_dot_product_input_4x8bit_packed
  return dot_4x8packed_ss_int(a, b);
#else
  int4 products = convert_int4(as_char4(a)) * convert_int4(as_char4(b));
  return products.x + products.y + products.z + products.w;
#endif
}}
static uint4 {TEXEL}({IMAGE} image, int i) {{
  return read_imageui(image, i);
}}

"""


def build_opencl(module: ir.IRModule, target: Target, output: Path) -> None:
    """Write the kernels' source as `output`, and beside it the programs that launch them.

    The same module gives the same bytes.
    """
    write_opencl(module, target, output)
    programs = write_programs(build_programs(module))
    output.with_suffix(PROGRAMS_SUFFIX).write_text(programs, encoding="utf-8")


def write_opencl(module: ir.IRModule, target: Target, output: Path) -> None:
    """Write only the kernels' source."""
    output.write_text(opencl_source(module, target), encoding="utf-8")


def opencl_source(module: ir.IRModule, target: Target) -> str:
    """Return OpenCL C of all device functions."""
    lower = tvm.transform.Sequential([tirx.StmtSimplify(), tirx.LowerIntrin()])
    # from the module: tvm.tirx has a function of the same name
    codegen_build = importlib.import_module("tvm.tirx.build").codegen_build
    parts = [PRELUDE]
    for name, function in sorted(module.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(function, PrimFunc) and "calling_conv" in function.attrs:
            # one by one, because TVM declares all other functions of a module before each
            built = codegen_build(lower(ir.IRModule({name: function})), TvmTarget(target.tvm))
            parts.append(_with_images(str(built.inspect_source())))
    return "".join(parts)


def _with_images(kernel: str) -> str:
    """Make parameters that are read as texels images, a type that TVM does not have."""
    for name in set(re.findall(rf"\b{TEXEL}\((\w+),", kernel)):
        kernel = re.sub(rf"__global \w+\* restrict {name}\b", f"{IMAGE} {name}", kernel)
    return kernel
