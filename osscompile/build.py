"""Turn lowered IR into a shared library, without a C compiler on the machine."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tvm import ir, relax
from tvm.target import Target as TvmTarget

from .errors import CompileError
from .targets import Target


def build_library(module: ir.IRModule, target: Target, output: Path) -> None:
    """Compile a module that went through all passes, and link it for the target's system.

    The same module gives the same bytes.
    """
    executable = relax.build(module, TvmTarget(target.tvm), relax_pipeline=None)

    def link(path: str, objects: Sequence[str], options: object = None, **kwargs: object) -> None:
        _link(Path(path), objects, target)

    link.output_format = output.suffix.removeprefix(".")  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as workspace:
        executable.export_library(str(output), fcompile=link, workspace_dir=workspace)


def _link(output: Path, objects: Sequence[str], target: Target) -> None:
    """Link with the C compiler of the ziglang package; functions of the C library resolve when
    the library is loaded, so that nothing of it is built here."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.link_triple]
    command += ["-shared", "-nostdlib", "-Wl,--build-id=none", "-o", str(output), *objects]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(
            f"linking {output.name}: expected ziglang to succeed, it said:\n{result.stderr.strip()}"
        )
