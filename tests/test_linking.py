"""Libraries are linked wherever they shall lie, and whoever compiles them."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tvm import ir
from tvm.script import tirx as T

from osscompile.codegen.library import build_library
from osscompile.runtime.devices.tvm_cpu import aligned_empty, load_function, tensor
from osscompile.targets import Target


def build(library: Path, target: Target) -> None:
    """A library whose `main` writes 7."""

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((1,), "float32")) -> None:
        T.func_attr({"tirx.noalias": True})
        x[0] = T.float32(7)

    build_library(ir.IRModule({"main": main}), target, library)


@pytest.mark.parametrize("name", ["50% off", "-o", "two\nlines", "quote'\"", "ünï", "@a$b\\c"])
def test_path_with_odd_characters(tmp_path: Path, this_machine: Target, name: str) -> None:
    """A % sent the linker elsewhere."""
    (tmp_path / name).mkdir()
    library = tmp_path / name / f"{name}.so"
    build(library, this_machine)
    array = aligned_empty((1,), np.dtype(np.float32))
    load_function(library, "main", threads=1)(tensor(array))
    assert array[0] == 7
    assert os.listdir(tmp_path) == [name] and os.listdir(tmp_path / name) == [library.name]


def test_path_that_is_relative(
    tmp_path: Path, this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(Path("lib.so"), this_machine)
    assert os.listdir() == ["lib.so"]


BUILD = """
from pathlib import Path
from test_linking import build
from osscompile import targets
build(Path("out", "lib.so"), targets.of_this_machine())
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Others reach it; those of pytest they do not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("home", [None, "home"])
def test_without_a_home_to_write_to(
    open_folder: Path, this_machine: Target, home: str | None
) -> None:
    """The linker keeps no cache, neither there nor beside the library."""
    (open_folder / "home").mkdir(mode=0o555)
    (open_folder / "out").mkdir()
    (open_folder / "out").chmod(0o777)
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    if home is not None:
        environment["HOME"] = str(open_folder / home)
    command = [*as_nobody(), sys.executable, "-c", BUILD]
    result = subprocess.run(
        command, cwd=open_folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert os.listdir(open_folder / "out") == ["lib.so"]
    assert os.listdir(open_folder / "home") == []


def as_nobody() -> list[str]:
    """What runs a command as a user without rights, where this one has all and that one sees our
    Python; else nothing."""
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if os.getuid() != 0 or not shutil.which(command[0]):
        return []
    zig = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'ziglang', 'version'])"
    sees = subprocess.run([*command, sys.executable, "-c", zig], capture_output=True)
    return command if sees.returncode == 0 else []
