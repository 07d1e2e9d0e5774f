"""The target for Metal and its kernels on this machine. g++ compiles them with
`metal/metal_stdlib`; a stand-in for TVM's Metal runtime, `metal/runtime.cc`, launches them."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import tvm
import tvm_ffi

from osscompile import targets
from osscompile.runtime.devices.tvm_runtime import (
    device_library,
    find_runtime_library,
    load_device_runtime,
)
from osscompile.targets import Target

(METAL,) = targets.load_variants("apple")
SHIM = Path(__file__).parent / "metal"
# Attributes are Metal's, and g++ does not see that a thread beyond the end computes nothing.
NO_WARNINGS = ["-Wno-attributes", "-Wno-unused", "-Wno-maybe-uninitialized"]
COMPILER = ["g++", "-std=c++17", "-Wall", "-Werror", *NO_WARNINGS, f"-I{SHIM}"]
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def on_this_machine(here: Target) -> Target:
    """Return Metal's target, with its host's part compiled for this machine."""
    return dataclasses.replace(
        METAL,
        tvm=METAL.tvm | {"host": here.tvm},
        system=here.system,
        architecture=here.architecture,
        link_triple=here.link_triple,
        link_flags=here.link_flags,
        library=here.library,
    )


def stand_in() -> dict[str, str]:
    """Return the environment of a process that finds the stand-in beside libtvm_runtime."""
    return {"OSSCOMPILE_TVM_RUNTIME": str(_build_runtime()), "METAL_COMPILER": " ".join(COMPILER)}


@cache
def load_stand_in() -> None:
    """Load the stand-in into this process."""
    environment = stand_in()
    os.environ["METAL_COMPILER"] = environment["METAL_COMPILER"]
    with mock.patch.dict(os.environ, environment):
        load_device_runtime("metal")


def reset() -> None:
    """Let kernels run again after one that failed."""
    tvm_ffi.get_global_func("metal.ResetGlobalState")()


@cache
def _build_runtime() -> Path:
    """Return libtvm_runtime in a folder with the stand-in."""
    installed = find_runtime_library()
    assert installed is not None
    folder = Path(tempfile.mkdtemp(prefix="metal-"))
    atexit.register(shutil.rmtree, folder)
    library = folder / installed.name
    library.symlink_to(installed)
    includes = [Path(str(package.__file__)).parent / "include" for package in (tvm, tvm_ffi)]
    command = [*COMPILER, "-O1", "-shared", "-fPIC", *(f"-I{path}" for path in includes)]
    output = device_library(library, "metal")
    subprocess.run([*command, str(SHIM / "runtime.cc"), "-o", str(output)], check=True)
    return library


def check_compiles(kernels: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    spaces = [f"namespace of_{name} {{\n{source}}}\n" for name, source in kernels.items()]
    file = folder / "kernels.cc"
    file.write_text("#include <metal_stdlib>\n" + "".join(spaces))
    command = [*COMPILER, "-fsyntax-only", str(file)]
    return subprocess.run(command, capture_output=True, text=True)
