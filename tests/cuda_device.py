"""The target h100 and its kernels on this machine: g++ compiles them with `cuda/nvcc.h`, and a
stand-in for NVIDIA's driver, `cuda/driver.cc`, launches them."""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

from metal_device import NO_WARNINGS

from osscompile import targets
from osscompile.errors import CompileError
from osscompile.runtime.devices import cuda, cuda_driver
from osscompile.targets import Target

(H100,) = targets.load_variants("h100")
SHIM = Path(__file__).parent / "cuda"
COMPILER = ["g++", "-std=c++17", "-Wall", "-Werror", *NO_WARNINGS, "-shared", "-fPIC"]
KERNEL = r'^extern "C" __global__ void (?:__launch_bounds__\((\d+)(?:, \d)?\) )?(\w+)\(.*\{$'
SHARED = re.compile(r"^( *)__shared__ (alignas\(\d+\)) (.* (\w+)\[\d+\];)$", re.MULTILINE)
ADDED = re.compile(r"^( *)extern __shared__ __align__\(1024\) (\w+) (\w+)\[\];$", re.MULTILINE)
ASM = re.compile(r'\basm(?: volatile)?\(((?:\s*"[^"]*")+)\s*:([^;]*)\);')


@cache
def driver() -> Path:
    """Build the stand-in's library."""
    folder = Path(tempfile.mkdtemp(prefix="cuda-"))
    atexit.register(shutil.rmtree, folder)
    output = folder / "libcuda.so.1"
    subprocess.run([*COMPILER, "-O2", str(SHIM / "driver.cc"), "-o", str(output)], check=True)
    return output


def open_here() -> cuda._Opened:
    """Open the stand-in's GPU."""
    with mock.patch.object(cuda_driver, "DRIVER", str(driver())):
        return cuda.CudaDevice.open()


def compile_here(source: str, target: Target, output: Path) -> None:
    """Replaces `codegen.cuda.compile_cuda`: compiles a module for the stand-in."""
    entries = "".join(
        f"CUDA_ENTRY({name}, {threads or H100.max_threads})\n"
        for threads, name in re.findall(KERNEL, source, re.MULTILINE)
    )
    source = SHARED.sub(r"\1\2 static \3 cuda_declare(\4, sizeof(\4));", ASM.sub(_call, source))
    source = ADDED.sub(r"\1\2* \3 = reinterpret_cast<\2*>(*cuda_added);", source)
    flags = ["-O1", f"-I{SHIM}", "-include", "nvcc.h", "-xc++", "-"]
    flags.append("-fno-strict-aliasing")  # TVM reads numbers' bits through pointers of other types
    flags.append("-Wno-unknown-pragmas")  # TVM asks nvcc not to unroll a while loop
    flags.append("-fno-gnu-unique")  # modules have kernels with the same names
    flags.append("-Wframe-larger-than=16384")  # a fibre's stack has twice that
    result = subprocess.run(
        [*COMPILER, *flags, "-o", str(output)],
        input=source + entries,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise CompileError(f"g++ refuses the source for {target.name}: {result.stderr[-3000:]}")


def _call(match: re.Match[str]) -> str:
    """Turn a PTX instruction into the call of a function of its name."""
    text = "".join(re.findall(r'"(.*?)"', match[1])).rstrip(";")
    operands = re.findall(r'"[+=]?[rfln]"\(((?:[^()]|\([^()]*\))*)\)', match[2])
    name, _, used = text.partition(" ")
    arguments = (
        operands[int(word[1:])] if word.startswith("%") else word
        for word in re.findall(r"%?\b\d+\b", used)
    )
    return f"{re.sub(r'[.:]+', '_', name)}({', '.join(arguments)});"
