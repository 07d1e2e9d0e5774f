"""Handle compiled artifacts in tests: damage them on purpose, and run Python in other folders."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tvm import ir

from osscompile import compiler, targets
from osscompile.passes import Pass
from osscompile.passes.plan_memory import plan_memory
from osscompile.runtime.manifest import MANIFEST
from osscompile.targets import Target


def _variants_here() -> list[str] | None:
    try:
        return [targets.of_this_machine().variant]
    except targets.TargetError:
        return None


# Tests that need no other variant use these: compiling all takes three times as long.
VARIANTS_HERE = _variants_here()
# The options with which `tiny_artifact` (conftest.py) is compiled.
TINY_OPTIONS = {
    "variants": VARIANTS_HERE,
    "profile": "exact",
    "context": 256,
    "prefill_chunk": 64,
}


def leave_libraries_empty(patch: pytest.MonkeyPatch, *passes: Pass) -> None:
    """Let compiles for CPUs make no kernels, which take most of their time, and go through these
    passes only before the one that plans memory."""

    def touch(module: ir.IRModule, target: Target, output: Path) -> None:
        output.touch()

    patch.setitem(compiler.BUILDS, "tvm", ((*passes, plan_memory), touch))


def copy_artifact(artifact: Path, folder: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(artifact, folder / "copy.osc"))


def flip_byte(file: Path, position: int) -> None:
    """Change one byte; a negative position counts from the end."""
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    file.write_bytes(content)


def reseal(artifact: Path, change: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Make all sizes and hashes right again after `change` to the manifest or damage to files, so
    that only checks of the contents can find it."""
    fields = json.loads((artifact / MANIFEST).read_text())
    for name in fields["files"]:
        if (artifact / name).is_file():
            content = (artifact / name).read_bytes()
            fields["files"][name] = {
                "num_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    if change is not None:
        change(fields)
    fields.pop("manifest_sha256", None)
    text = json.dumps(fields, sort_keys=True)
    fields["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (artifact / MANIFEST).write_text(json.dumps(fields, indent=1))


def library_is_loaded(artifact: Path) -> bool:
    """Whether this process has a library of the artifact, which is code, in its memory.

    Without /proc the answer is no.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return any(f"{artifact.resolve()}/lib" in line for line in lines)  # a copy of it, in memory


def run_python(
    code: str,
    *arguments: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code in a new process of this Python; its output is in the message if it fails."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result
