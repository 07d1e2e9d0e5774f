"""Turn lowered IR into a shared library, without a C compiler on the machine."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tvm
from tvm import ir, relax
from tvm.target import Target as TvmTarget

from ..errors import CompileError
from ..targets import Target
from .tools import run_tool

ROOM_BYTES = 16 << 20  # more than objects and library take, about 2 MB
# passes of TVM that take a tenth to a quarter of the time and change nothing here
DISABLED_PASSES = ["s_tir.HoistIfThenElse", "tirx.RemoveNoOp"]


def build_library(module: ir.IRModule, target: Target, output: Path) -> None:
    """Compile a module that went through all passes, or scheduled kernels, and link it for the
    target's system.

    The same module gives the same bytes. Raises CompileError if the linker fails, OSError if there
    is no room.
    """
    machine = TvmTarget(target.tvm)
    with tvm.transform.PassContext(disabled_pass=DISABLED_PASSES):
        if any(isinstance(function, relax.Function) for function in module.functions.values()):
            executable = relax.build(module, machine, relax_pipeline=None)
        else:
            executable = tvm.compile(module, machine)

    def link(path: str, objects: Sequence[str], options: object = None, **kwargs: object) -> None:
        _link(Path(path), [Path(file) for file in objects], target)

    link.output_format = output.suffix.removeprefix(".")  # type: ignore[attr-defined]
    # beside the output, where the next compile removes what a killed one leaves
    with tempfile.TemporaryDirectory(dir=output.parent) as workspace:
        _check_room(Path(workspace))
        executable.export_library(str(output), fcompile=link, workspace_dir=workspace)


def _check_room(folder: Path) -> None:
    """Raise OSError if the disk or a quota is full, where LLVM would end the process."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(bytes(ROOM_BYTES))


def _link(output: Path, objects: Sequence[Path], target: Target) -> None:
    """Link with the C compiler of the ziglang package; functions of the C library resolve when
    the library is loaded, so that nothing of it is built here.

    It works in the objects' folder, and names no other: its linker writes elsewhere if there is a %
    in the path of what it shall write. Its cache is there too, since a user may have no home, and
    holds nothing that makes the next link faster.
    """
    folder = objects[0].parent
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.link_triple]
    command += ["-shared", "-nostdlib", "-s", *target.link_flags, "-o", output.name]
    command += [file.relative_to(folder).as_posix() for file in objects]
    caches = {"ZIG_GLOBAL_CACHE_DIR": "cache", "ZIG_LOCAL_CACHE_DIR": "cache"}
    result = run_tool(command, folder, caches)
    if result.returncode != 0:
        raise CompileError(
            f"linking {output.name}: expected ziglang to succeed, it ended with status "
            f"{result.returncode} and said: {result.stderr.strip() or 'nothing'}; is the package "
            "ziglang complete, and is there room on the disk?"
        )
    (folder / output.name).replace(output)
