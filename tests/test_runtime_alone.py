"""The runtime without the compiler, in an environment with only what a bundle asks for."""

import _ctypes
import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
from opencl_device import needs_opencl

from osscompile.bench import plot
from osscompile.bundle import bundle_runtime
from osscompile.runtime.bench.report import read_reports

# tvm_ffi imports typing-extensions. huggingface_hub, which tokenizers requires, is left out on
# purpose: only downloads need it.
PACKAGES = ("apache-tvm-ffi", "typing-extensions", "numpy", "tokenizers")
# These are there where they are installed here: an OpenCL device takes them.
OPENCL_PACKAGES = ("pyopencl", "pytools", "platformdirs", "siphash24", "pocl-binary-distribution")

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
    installed = {distribution.name for distribution in metadata.distributions()}
    for package in (*PACKAGES, *installed.intersection(OPENCL_PACKAGES)):
        for file in metadata.distribution(package).files or ():
            if ".." not in file.parts and "tests" not in file.parts:
                target = site_packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(Path(str(file.locate())).read_bytes())
    bench = bundle_runtime(site_packages) / "bench" / "bandwidth_device.py"
    text = bench.read_text()  # a bench reads less memory here: how fast it is, nobody asks
    bench.write_text(text.replace("READ_BYTES = 1 << 30", "READ_BYTES = 1 << 22"))
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


# The commands


def command(environment: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(environment), "-m", "osscompile_runtime", *map(str, arguments)],
        cwd=cwd,
        # PoCL looks for a linker there, and keeps what it compiled here.
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
    )


def test_run_and_inspect_alone(environment: Path, nano_artifact: Path, tmp_path: Path) -> None:
    question = ["What is 17 + 25?", "--hide-analysis"]
    result = command(environment, tmp_path, "run", nano_artifact, *question)
    assert (result.returncode, result.stdout.strip()) == (0, "17 + 25 = 42."), result.stderr
    result = command(environment, tmp_path, "inspect", nano_artifact)
    assert "KV cache" in result.stdout and "(runs here)" in result.stdout, result.stderr


def test_an_error_alone_names_the_command_that_was_typed(environment: Path, tmp_path: Path) -> None:
    result = command(environment, tmp_path, "bench", "none.osc")
    assert result.returncode == 1
    assert result.stderr.startswith("python -m osscompile_runtime: none.osc: expected an artifact")
    assert "Traceback" not in result.stderr


def test_bench_of_a_cpu_alone_leaves_out_what_takes_a_compiler(
    environment: Path, nano_artifact: Path, tmp_path: Path
) -> None:
    """What it measures is in the report, and its lack of limits too; the full package reads it."""
    options = ["--prefill", "16,99999", "--decode", "0", "--json", "r.json"]
    result = command(environment, tmp_path, "bench", nano_artifact, *options)
    assert result.returncode == 0, result.stderr
    assert "read bandwidth: not measured" in result.stdout
    assert "decode at 0" in result.stdout and "roofline" not in result.stdout
    assert "warning: " in result.stderr and "left out prefill 99999: " in result.stderr
    (report,) = read_reports(tmp_path / "r.json")
    assert report.bandwidth is None and report.bandwidth_at == {} and report.int8_peak is None
    assert list(report.prefill) == [16] and list(report.decode) == [0]
    pytest.importorskip("matplotlib")
    plot.plot(tmp_path / "p.png", [report])


@needs_opencl
def test_bench_of_a_device_alone(environment: Path, nano_opencl: Path, tmp_path: Path) -> None:
    """A driver compiles what reads its memory: nothing is left out."""
    options = ["--prefill", "16", "--decode", "0"]
    result = command(environment, tmp_path, "bench", nano_opencl, *options)
    assert result.returncode == 0, result.stderr
    assert "read bandwidth" in result.stdout and "of roofline" in result.stdout
    assert "read bandwidth: not measured" not in result.stdout


# The library


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
        assert f"found no file that can be read at {wrong}" in error


def test_runtime_library_by_a_name_without_a_slash(
    environment: Path, nano_artifact: Path, tmp_path: Path
) -> None:
    """It is the file here, not one that the system finds by this name."""
    (tmp_path / "libz.so.1").write_bytes(b"\x7fELF and nothing else")
    error = ask_with_library(environment, nano_artifact, "libz.so.1", cwd=tmp_path)
    assert f"ArtifactError: {tmp_path}/libz.so.1: expected TVM's runtime" in error


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
    environment: Path,
    artifact: Path,
    library: str,
    *,
    remove: bool = False,
    cwd: Path | None = None,
) -> str:
    """Return the last line on stderr of a load with OSSCOMPILE_TVM_RUNTIME set. `remove` makes the
    bundle one without its own library."""
    code = "import sys, osscompile_runtime.devices.tvm_runtime\n"
    if remove:
        code += "osscompile_runtime.devices.tvm_runtime.RUNTIME_LIBRARY = 'libtvm_runtime.none'\n"
    code += "osscompile_runtime.load(sys.argv[1])"
    result = subprocess.run(
        [str(environment), "-c", code, str(artifact)],
        env={"OSSCOMPILE_TVM_RUNTIME": library},
        cwd=cwd or artifact.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]
