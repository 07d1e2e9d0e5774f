"""Run the programs that make machine code: a linker, or the compiler of a GPU's maker."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_running: dict[int, Path] = {}  # by the id of the process, which leads a group: where it works


def run_tool(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` to its end; its output is text. `environment`: beside our own."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # what it starts itself ends with it
    )
    _running[process.pid] = folder
    try:
        output, errors = process.communicate()
    except BaseException:  # an interrupt of this thread: nobody waits for the program any more
        _end(process.pid)
        process.wait()
        raise
    finally:
        del _running[process.pid]
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def find_nvcc() -> str | None:
    """Look for CUDA's compiler on the path and under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def end_tools(folder: Path) -> None:
    """End the programs that other threads run in `folder` or below."""
    for process, where in list(_running.items()):
        if where.is_relative_to(folder):
            _end(process)


def _end(process: int) -> None:
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:  # it ended meanwhile
        pass
