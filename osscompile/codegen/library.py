"""Turn lowered IR into a shared library, without a C compiler on the machine."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tvm
from tvm import ir, relax
from tvm.target import Target as TvmTarget

from ..errors import CompileError
from ..targets import Target

ROOM_BYTES = 16 << 20  # more than objects and library take, about 2 MB


def build_library(module: ir.IRModule, target: Target, output: Path) -> None:
    """Compile a module that went through all passes, or scheduled kernels, and link it for the
    target's system.

    The same module gives the same bytes. Raises CompileError if the linker fails, OSError if there
    is no room.
    """
    machine = TvmTarget(target.tvm)
    if any(isinstance(function, relax.Function) for function in module.functions.values()):
        executable = relax.build(module, machine, relax_pipeline=None)
    else:
        executable = tvm.compile(module, machine)

    def link(path: str, objects: Sequence[str], options: object = None, **kwargs: object) -> None:
        _link(Path(path), objects, target)

    link.output_format = output.suffix.removeprefix(".")  # type: ignore[attr-defined]
    # beside the output, where the next compile removes what a killed one leaves
    with tempfile.TemporaryDirectory(dir=output.parent) as workspace:
        _check_room(Path(workspace))
        executable.export_library(str(output), fcompile=link, workspace_dir=workspace)


def _check_room(folder: Path) -> None:
    """Raise OSError if the disk or a quota is full, where LLVM would end the process."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(bytes(ROOM_BYTES))


def _link(output: Path, objects: Sequence[str], target: Target) -> None:
    """Link with the C compiler of the ziglang package. Functions of the C library resolve when the
    library is loaded, so that no C library is built here."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.link_triple]
    command += ["-shared", "-nostdlib", *target.link_flags, "-o", str(output), *objects]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(
            f"linking {output.name}: expected ziglang to succeed, it ended with status "
            f"{result.returncode} and said: {result.stderr.strip() or 'nothing'}; is the package "
            "ziglang complete, and is there room on the disk?"
        )
