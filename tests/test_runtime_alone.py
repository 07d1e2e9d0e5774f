"""The runtime without the compiler, in an environment with only what a bundle asks for."""

import _ctypes
import json
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

from osscompile.bundle import bundle_runtime

# tvm_ffi imports typing-extensions. huggingface_hub, which tokenizers requires, is left out on
# purpose: only downloads need it.
PACKAGES = ("apache-tvm-ffi", "typing-extensions", "numpy", "tokenizers")

# Slow steps are measured in a process that did them once before; printed, never asserted.
ASK = """
import sys, time
start = time.perf_counter()
import osscompile_runtime
model = osscompile_runtime.load(sys.argv[1])
seconds = time.perf_counter() - start
messages = [{"role": "user", "content": "What is 17 + 25?"}]
pieces = list(model.chat(messages, reasoning="low", current_date="2025-06-28"))
answer = "".join(piece.text for piece in pieces if piece.channel == "final")
import importlib.util, json
print(json.dumps({
    "answer": answer,
    "seconds": seconds,
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "can import": [n for n in ("tvm", "torch", "osscompile", "transformers", "huggingface_hub",
                               "ziglang") if importlib.util.find_spec(n)],
    "libraries": sorted({line.split()[-1] for line in open("/proc/self/maps") if "/" in line})
    if sys.platform == "linux" else [],
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with `PACKAGES` and a bundle; returns its interpreter.

    The packages are copied from this environment, file by file, as their wheels installed them.
    """
    root = tmp_path_factory.mktemp("alone")
    venv.create(root, symlinks=True)
    paths = sysconfig.get_paths(
        "venv", {"base": str(root), "platbase": str(root), "installed_base": sys.base_prefix}
    )
    site_packages = Path(paths["purelib"])
    for package in PACKAGES:
        for file in metadata.distribution(package).files or ():
            if ".." not in file.parts and "tests" not in file.parts:
                target = site_packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(Path(str(file.locate())).read_bytes())
    bundle_runtime(site_packages)
    return Path(paths["scripts"]) / "python"


@pytest.fixture(scope="module")
def runs(environment: Path, nano_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    """The output of `ASK` in two processes, one after the other."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [str(environment), "-I", "-c", ASK, str(nano_artifact)]
    results = []
    for _ in range(2):
        result = subprocess.run(command, cwd=elsewhere, env={}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        results.append(json.loads(result.stdout))
    return results


def test_nano_answers_without_the_compiler(runs: list) -> None:
    assert [run["answer"] for run in runs] == ["17 + 25 = 42."] * 2


def test_nothing_of_the_compiler_is_there(runs: list) -> None:
    assert runs[0]["can import"] == []
    assert not {"tvm", "torch", "osscompile"} & set(runs[0]["modules"])
    libraries = {Path(path).name for path in runs[0]["libraries"]}
    if sys.platform == "linux":
        assert {name for name in libraries if name.startswith("libtvm")} == {
            "libtvm_runtime.so",
            "libtvm_ffi.so",
            "libtvm_ffi_testing.so",  # tvm_ffi loads it beside its library
        }
    assert not {name for name in libraries if "LLVM" in name or "compiler" in name}


def test_time_to_import_and_load_nano(runs: list, capsys: pytest.CaptureFixture[str]) -> None:
    """Times are not asserted, because machines differ. Imported modules are: they make it slow."""
    with capsys.disabled():
        print(f"\nimport and load of nano: {runs[1]['seconds']:.2f} s", end=" ")
    slow = {"torch", "tvm", "transformers", "huggingface_hub", "pandas", "scipy", "jinja2"}
    assert not slow & set(runs[1]["modules"])


def test_runtime_says_that_its_library_is_missing(environment: Path, nano_artifact: Path) -> None:
    error = ask_with_library(environment, nano_artifact, "", remove=True)
    assert "ArtifactError: expected libtvm_runtime" in error
    assert "osscompile bundle" in error and "OSSCOMPILE_TVM_RUNTIME" in error


def test_runtime_library_that_is_no_file(
    environment: Path, nano_artifact: Path, tmp_path: Path
) -> None:
    """The bundle's own is not taken instead: someone meant another."""
    for wrong in (tmp_path / "none", tmp_path):
        error = ask_with_library(environment, nano_artifact, str(wrong))
        assert "ArtifactError: OSSCOMPILE_TVM_RUNTIME: expected the path of libtvm_run" in error
        assert f"found no file at {wrong}" in error


def test_runtime_library_that_is_another_library(environment: Path, nano_artifact: Path) -> None:
    error = ask_with_library(environment, nano_artifact, _ctypes.__file__)
    assert f"ArtifactError: {_ctypes.__file__}: expected TVM's runtime" in error


def test_runtime_library_that_is_no_library(
    environment: Path, nano_artifact: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "libtvm_runtime.so"
    broken.write_bytes(b"\x7fELF and nothing else")
    error = ask_with_library(environment, nano_artifact, str(broken))
    assert f"ArtifactError: {broken}: expected TVM's runtime" in error


def ask_with_library(
    environment: Path, artifact: Path, library: str, *, remove: bool = False
) -> str:
    """Return the last line on stderr of a load with OSSCOMPILE_TVM_RUNTIME set. `remove` makes the
    bundle one without its own library."""
    code = "import sys, osscompile_runtime\n"
    if remove:
        code += "osscompile_runtime.devices.tvm_runtime.RUNTIME_LIBRARY = 'libtvm_runtime.none'\n"
    code += "osscompile_runtime.load(sys.argv[1])"
    result = subprocess.run(
        [str(environment), "-c", code, str(artifact)],
        env={"OSSCOMPILE_TVM_RUNTIME": library},
        cwd=artifact.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]
