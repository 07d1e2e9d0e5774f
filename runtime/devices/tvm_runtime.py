"""TVM's runtime, without TVM's compiler: find and load it, its threads, and compiled libraries."""

import ctypes
import importlib
import importlib.util
import os
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ArtifactError, OsscompileError
from ..machine import usable_threads
from .library_file import private_copy, read_library

FAST_CORES = 1  # TVM's thread pool: prefer the cores with the highest frequency
NAMED = "OSSCOMPILE_TVM_RUNTIME"  # the variable that names another
RUNTIME_FOLDER = Path(__file__).parent.parent  # where a bundle has it
RUNTIME_LIBRARY = {"Darwin": "libtvm_runtime.dylib"}.get(os.uname().sysname, "libtvm_runtime.so")


def load_function(library: Path, name: str, threads: int, sha256: str | None = None) -> Any:
    """A function of a compiled library, which is closed when its last function has gone.

    `threads`: see `use_threads`; `sha256`: of the library. Raises ArtifactError for a library that
    this machine cannot load.
    """
    use_threads(threads)
    content = read_library(library, sha256)
    load = load_runtime().get_global_func("ffi.Module.load_from_file.so")
    try:
        with private_copy(content, library) as path:
            return load(path, "so").get_function(name, query_imports=True)
    except Exception as error:  # the loader raises whatever the library makes it raise
        raise ArtifactError(
            f"{library}: expected a library that this machine can load, found: {error}; "
            "compile the model again for this machine"
        ) from error


def use_threads(threads: int) -> None:
    """How many CPU threads the functions use that this thread calls from now on."""
    if getattr(_configured, "threads", None) != threads:
        _limit_pool()
        load_runtime().get_global_func("runtime.config_threadpool")(FAST_CORES, threads)
        _configured.threads = threads


def _limit_pool() -> None:
    """Tell TVM how many threads it may start for a thread that calls it: it would take half of the
    cores it sees, or what TVM_NUM_THREADS says, and where they are more than the cores, each step
    takes seconds."""
    most, named = usable_threads(), os.environ.get("TVM_NUM_THREADS", "")
    if named.isdigit() and int(named) > most:
        warnings.warn(
            f"TVM_NUM_THREADS: expected at most {most}, which is what this process may use, found "
            f"{named}; {most} are used",
            stacklevel=2,
        )
    if not (named.isdigit() and 1 <= int(named) <= most):
        os.environ["TVM_NUM_THREADS"] = str(most)
    if most < (os.cpu_count() or 1):  # TVM would bind threads to cores that others were given
        os.environ.setdefault("TVM_BIND_THREADS", "0")


_configured = threading.local()


@cache
def load_runtime() -> ModuleType:
    """Load tvm_ffi, then libtvm_runtime, whose symbols compiled libraries look for."""
    ffi = _import_ffi()
    library = find_runtime_library()
    if library is None:
        raise ArtifactError(
            f"expected {RUNTIME_LIBRARY} beside the runtime or in an installed apache-tvm, found "
            f"neither; run `osscompile bundle`, or set {NAMED} to its path"
        )
    if not hasattr(_load_globally(library), "TVMBackendParallelLaunch"):
        raise _no_runtime(library, "another library")
    return ffi


@cache
def load_device_runtime(device: str) -> ModuleType:
    """Load what TVM's runtime has for a device (one of `manifest.DEVICES`), from beside it."""
    ffi = load_runtime()
    library = find_runtime_library(device)
    if library is None:
        raise OsscompileError(
            f"{device}: expected {device_library(Path(RUNTIME_LIBRARY), device)} beside "
            f"{RUNTIME_LIBRARY}, found none; install an apache-tvm that has it, or run `osscompile "
            "bundle` again where one is installed"
        )
    _load_globally(library)
    return ffi


def device_library(runtime: Path, device: str) -> Path:
    """Where a library of TVM's runtime has what belongs to a device."""
    return runtime.with_stem(f"{runtime.stem}_{device}")


def _load_globally(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise _no_runtime(library, error) from error


def _no_runtime(library: Path, found: object) -> ArtifactError:
    return ArtifactError(
        f"{library}: expected TVM's runtime for this machine, found: {found}; install the "
        "apache-tvm that the artifact was compiled with, or run `osscompile bundle` again"
    )


def find_runtime_library(device: str | None = None) -> Path | None:
    """What OSSCOMPILE_TVM_RUNTIME names, or a copy beside the runtime, or the one of an installed
    apache-tvm; of a `device`, what lies beside that. Raises ArtifactError for a name of no file."""
    candidates = [RUNTIME_FOLDER / RUNTIME_LIBRARY]
    if named := os.environ.get(NAMED):
        # absolute: for a name without a slash the system would look in places of its own
        candidates.insert(0, Path(named).absolute())
        if not os.path.isfile(named):  # pathlib raises where a folder may not be read
            raise ArtifactError(
                f"{NAMED}: expected the path of {RUNTIME_LIBRARY}, found no file that can be read "
                f"at {named}; correct it, or unset it to use the one that is installed"
            )
    package = importlib.util.find_spec("tvm")  # finds it without importing it
    if package is not None and package.origin is not None:
        candidates.append(Path(package.origin).parent / "lib" / RUNTIME_LIBRARY)
    found = next((path for path in candidates if path.is_file()), None)
    if found is None or device is None:
        return found
    beside = device_library(found, device)
    return beside if beside.is_file() else None


def _import_ffi() -> ModuleType:
    """Import tvm_ffi, which would import torch first where torch is installed: seconds."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("tvm_ffi")
    finally:
        if hide:
            del sys.modules["torch"]
