"""AArch64 Linux under emulation by qemu-user: Python, what the runtime imports, and kernels.

`python tests/aarch64.py FOLDER` downloads everything, 130 MB, with this machine's pip and apt
(Debian's). Tests look for it in the folder that `OSSCOMPILE_AARCH64` names.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import ir

from osscompile.bundle import bundle_runtime
from osscompile.codegen.library import build_library
from osscompile.targets import Target

ARCHITECTURE = "aarch64"  # platform.machine() under emulation
VARIABLE = "OSSCOMPILE_AARCH64"
EMULATOR = "qemu-aarch64"
PYTHON = "python3.11"  # the one in Debian 12
DEBS = (PYTHON, "libpython3.11", "libstdc++6")
WHEELS = ("apache-tvm-ffi", "numpy", "tokenizers", "typing-extensions")  # tvm_ffi needs the last
TVM = "apache-tvm"  # only libtvm_runtime.so is taken
TVM_RUNTIME = "tvm/lib/libtvm_runtime.so"
# versions of libc in the names of wheels
MANYLINUX = ("2014", "_2_17", "_2_24", "_2_27", "_2_28")
# Prints the features that Linux would list in /proc/cpuinfo, from the bits of getauxval.
FEATURES = """
import ctypes
auxiliary = ctypes.CDLL(None).getauxval
auxiliary.restype = ctypes.c_ulong
names = {16: {0: "fp", 1: "asimd", 9: "fphp", 10: "asimdhp", 20: "asimddp"}, 26: {13: "i8mm"}}
print(*(n for kind, bits in names.items() for b, n in bits.items() if auxiliary(kind) >> b & 1))
"""


def why_absent() -> str | None:
    """Say what emulation lacks here, or None."""
    if shutil.which(EMULATOR) is None:
        return f"needs {EMULATOR} (Debian's qemu-user)"
    folder = os.environ.get(VARIABLE)
    if folder is None or not _cpuinfo(Path(folder)).is_file():
        return f"needs {VARIABLE}, a folder that `python tests/aarch64.py FOLDER` made"
    return None


def command(bundle: Path, *arguments: object) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a Python process that imports the runtime of `bundle`."""
    folder = Path(os.environ[VARIABLE])
    environment = {"PYTHONPATH": f"{folder / 'site'}:{bundle}", "PATH": os.environ["PATH"]}
    return _python(folder, *arguments), environment | {"PYTHONHOME": str(folder / "root/usr")}


def bundle_for_aarch64(directory: Path) -> Path:
    """Bundle as `osscompile bundle` would on an AArch64 machine."""
    os.environ["OSSCOMPILE_TVM_RUNTIME"] = str(Path(os.environ[VARIABLE]) / TVM_RUNTIME)
    try:
        bundle_runtime(directory)
    finally:
        del os.environ["OSSCOMPILE_TVM_RUNTIME"]
    return directory


class Kernels:
    """A process that runs kernels (`aarch64_worker.py`). It ends with this process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        bundle = bundle_for_aarch64(Path(self._folder.name))
        arguments, environment = command(bundle, Path(__file__).with_name("aarch64_worker.py"))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(arguments, env=environment, stdin=pipe, stdout=pipe)

    def build(self, module: ir.IRModule, target: Target) -> Path:
        """Build the library of a module with one kernel, `main`."""
        self._count += 1
        library = Path(self._folder.name) / f"kernel{self._count}.so"
        build_library(module, target, library)
        return library

    def run(self, library: Path, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Call `main` with the arguments, and return what they hold afterwards."""
        assert self._process.stdin is not None and self._process.stdout is not None
        file = library.with_suffix(".npz")
        np.savez(file, *arrays)  # type: ignore[arg-type]
        self._process.stdin.write(f"{library}\n".encode())
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == b"done\n", f"the emulated process ended: {self._process.wait()}"
        with np.load(file) as results:
            return [results[name] for name in results.files]


@cache
def kernels() -> Kernels:
    return Kernels()


def prepare(folder: Path) -> None:
    """Download and unpack everything into a folder; the last file written makes it complete."""
    if _cpuinfo(folder).is_file():
        return
    (folder / "root").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        for deb in _download_debs(Path(downloads)):
            subprocess.run(["dpkg", "-x", deb, folder / "root"], check=True)
        for wheel in _download_wheels(Path(downloads), *WHEELS):
            zipfile.ZipFile(wheel).extractall(folder / "site")
        for wheel in _download_wheels(Path(downloads), TVM):
            zipfile.ZipFile(wheel).extract(TVM_RUNTIME, folder)
    environment = {"PYTHONHOME": str(folder / "root/usr"), "PATH": os.environ["PATH"]}
    listed = subprocess.run(
        _python(folder, "-c", FEATURES), env=environment, check=True, capture_output=True, text=True
    )
    _cpuinfo(folder).parent.mkdir()
    _cpuinfo(folder).write_text(f"Features\t: {listed.stdout}")


def _cpuinfo(folder: Path) -> Path:
    """Return the emulated processes' /proc/cpuinfo; some versions of qemu show the host's."""
    return folder / "root/proc/cpuinfo"


def _python(folder: Path, *arguments: object) -> list[str]:
    root = folder / "root"
    python = root / "usr/bin" / PYTHON
    return [EMULATOR, "-cpu", "max", "-L", str(root), str(python), "-BS", *map(str, arguments)]


def _download_debs(folder: Path) -> list[Path]:
    """Download packages with all that they depend on, in a state of apt of its own."""
    (folder / "status").touch()
    options = ["APT::Architecture=arm64", "APT::Architectures=arm64", f"Dir::State={folder}/state"]
    options += [f"Dir::State::status={folder}/status", f"Dir::Cache={folder}/cache"]
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    for lists in ("state/lists/partial", "cache/archives/partial"):
        (folder / lists).mkdir(parents=True)
    subprocess.run([*apt, "update"], check=True)
    download = ["install", "--download-only", "-y", "--no-install-recommends", *DEBS]
    subprocess.run([*apt, *download], check=True)
    return sorted((folder / "cache/archives").glob("*.deb"))


def _download_wheels(folder: Path, *packages: str) -> list[Path]:
    """Download wheels of the versions that are installed here."""
    wheels = Path(tempfile.mkdtemp(dir=folder))
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp"]
    options += [f"--platform=manylinux{libc}_aarch64" for libc in MANYLINUX]
    options += [f"--python-version={re.sub('[^0-9.]', '', PYTHON)}", "--abi=cp311", "--abi=abi3"]
    pinned = [f"{name}=={metadata.version(name)}" for name in packages]
    pip = [sys.executable, "-m", "pip", "download", *options, "--abi=none", "-d", wheels, *pinned]
    subprocess.run(pip, check=True)
    return sorted(wheels.glob("*.whl"))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).resolve())
