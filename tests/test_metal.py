"""Artifacts for Metal. No Mac is at hand where this runs, so compiles for one are inspected, and
their kernels are compiled as C++. With this machine's CPU as the host they also run, in TVM's own
virtual machine, on a stand-in for TVM's Metal runtime (see `metal_device.py`)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cache_reuse
import tvm
from artifacts import copy_artifact, library_is_loaded, reseal, run_python
from device_choices import (
    check_broken_weights_show,
    check_logits_stay,
    check_rows_of_all_kinds,
    options_together,
)
from device_models import OF_GPT_OSS, check_exact, check_nano
from metal_device import METAL, check_compiles, load_stand_in, needs_gxx, on_this_machine, stand_in
from talker import CHUNK, compile_talker, random_ids
from test_cross_compile import ARM64, CODE_SIGNATURE, DYLIB, ID_DYLIB, MACH_O_64, load_commands

import osscompile
from osscompile import cli, targets
from osscompile.bundle import bundle_runtime
from osscompile.codegen.library import build_library
from osscompile.importer.choice import with_choose
from osscompile.importer.config import ModelConfig
from osscompile.importer.graph import build_graph
from osscompile.importer.resolve import resolve_model
from osscompile.importer.synthetic import gpt_oss_config
from osscompile.passes import SHARED_PASSES, VARIANT_PASSES, run_passes
from osscompile.runtime import load
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.devices.tvm_runtime import device_library, find_runtime_library
from osscompile.runtime.errors import ArtifactError, OsscompileError
from osscompile.targets import Target

MAX_BUFFERS = 31  # as arguments of a kernel
ITEM_BYTES = {"char": 1, "float": 4, "int": 4, "uint": 4}

# --- Compiles for a Mac -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("metal") / "nano.osc"
    return osscompile.compile("nano", METAL.name, output, context=1024)


def test_library_is_a_signed_dylib_with_kernels_inside(nano: Path) -> None:
    manifest = read_manifest(nano)
    assert (manifest.runtime, manifest.device) == ("tvm", "metal")
    assert (manifest.system, manifest.architecture) == ("Darwin", "arm64")
    check_library((nano / "lib.dylib").read_bytes())


def check_library(library: bytes) -> None:
    assert struct.unpack_from("<IIxxxxI", library) == (MACH_O_64, ARM64, DYLIB)
    commands = load_commands(library)
    assert CODE_SIGNATURE in commands and b"@rpath/lib.dylib\0" in commands[ID_DYLIB]
    assert library.count(b"\nkernel void ") > 30


def test_same_model_gives_the_same_bytes(nano: Path, tmp_path: Path) -> None:
    """Another process gives them too."""
    code = "import osscompile, sys; osscompile.compile('nano', *sys.argv[1:], context=1024)"
    run_python(code, METAL.name, tmp_path / "again.osc", cwd=tmp_path)
    for file in nano.iterdir():
        assert file.read_bytes() == (tmp_path / "again.osc" / file.name).read_bytes(), file.name


def kernels_in(library: bytes) -> dict[str, str]:
    """Return the sources of kernels by name."""
    sources = re.findall(rb"#include <metal_stdlib>\n.*?\n}\n\n", library, re.DOTALL)
    names = [re.findall(rb"^kernel void (\w+)\(", source, re.MULTILINE) for source in sources]
    return {name.decode(): s.decode() for (name,), s in zip(names, sources, strict=True)}


@needs_gxx
@OF_GPT_OSS
def test_every_kernel_compiles(num_experts: int, profile: str, tmp_path: Path) -> None:
    """Two layers contain every kernel."""
    config = gpt_oss_config(num_layers=2, num_experts=num_experts)
    check_every_kernel(config, profile, tmp_path)


@needs_gxx
@pytest.mark.long
@pytest.mark.parametrize("profile", ["fast", "exact"])
def test_every_kernel_of_nano_compiles(profile: str, tmp_path: Path) -> None:
    check_every_kernel(resolve_model("nano").source.config, profile, tmp_path)


def check_every_kernel(config: ModelConfig, profile: str, tmp_path: Path) -> None:
    """Kernels keep within Metal's limits, and declare a threadgroup's memory where Metal wants it:
    where the kernel begins."""
    graph = build_graph(config, profile, min(config.max_context, 131072), 512)
    module = with_choose(graph.module, config.vocab_size, 64)
    module = run_passes(module, METAL, SHARED_PASSES + VARIANT_PASSES)
    build_library(module, METAL, tmp_path / METAL.library)
    library = (tmp_path / METAL.library).read_bytes()
    check_library(library)
    kernels = kernels_in(library)
    assert sum("simdgroup_multiply_accumulate(" in source for source in kernels.values()) > 4
    assert len(kernels) == library.count(b"\nkernel void ")
    result = check_compiles(kernels, tmp_path)
    assert result.returncode == 0, result.stderr
    for name, source in kernels.items():
        shared = re.findall(r"^  threadgroup (\w+) \w+\[(\d+)\];", source, re.MULTILINE)
        assert len(shared) == len(re.findall(r"threadgroup \w+ \w+\[", source)), name
        most = METAL.tvm["max_shared_memory_per_block"]
        assert sum(ITEM_BYTES[dtype] * int(size) for dtype, size in shared) <= most, name
        assert max(map(int, re.findall(r"\[\[ buffer\((\d+)\) \]\]", source))) < MAX_BUFFERS, name


# --- Machines where it cannot run -------------------------------------------------------------


def test_artifact_for_a_mac_on_another_machine(nano: Path, this_machine: Target) -> None:
    if this_machine.system == METAL.system:
        pytest.skip("this is a Mac")
    with pytest.raises(ArtifactError, match=r"made for Darwin on arm64, this machine is"):
        osscompile.load(nano)
    assert not library_is_loaded(nano)


def test_inspect(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(nano)]) == 0
    assert "apple: Darwin arm64, metal" in " ".join(capsys.readouterr().out.split())


def test_unknown_device(nano: Path, tmp_path: Path, this_machine: Target) -> None:
    copy = copy_artifact(nano, tmp_path)
    here = {"system": this_machine.system, "architecture": this_machine.architecture}
    reseal(copy, lambda fields: fields.update(here, device="abacus"))
    with pytest.raises(ArtifactError, match=r"expected one of .*metal.* as device, found 'abacus'"):
        osscompile.load(copy)


@pytest.fixture(scope="module")
def for_here(this_machine: Target) -> Iterator[None]:
    """Let compiles for Metal take this machine as the host."""
    here, load_variants = on_this_machine(this_machine), targets.load_variants
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            targets, "load_variants", lambda n: (here,) * (n == METAL.name) or load_variants(n)
        )
        yield


@pytest.fixture(scope="module")
def nano_here(for_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("here") / "nano.osc"
    return osscompile.compile("nano", METAL.name, output, context=1024)


LOAD = """
import sys
from osscompile.runtime import OsscompileError, load
try:
    print(load(sys.argv[1]).logits([1]).shape)
except OsscompileError as error:
    print(type(error).__name__, error)
"""


def test_without_the_metal_runtime(nano_here: Path, tmp_path: Path) -> None:
    said = run_python(LOAD, nano_here, cwd=tmp_path).stdout
    expected = r"metal: expected libtvm_runtime_metal\.\w+ beside libtvm_runtime\.\w+, found none"
    assert re.match(f"OsscompileError {expected}; install an apache-tvm", said), said


@needs_gxx
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "(1, 1024)"),
        ({"METAL_NO_DEVICE": "1"}, "OsscompileError metal: expected a device, found none"),
        (
            {"METAL_ROOM": "1000000"},
            "OsscompileError metal: expected .* GB that the device may use",
        ),
        (
            {"METAL_COMPILER": "false"},
            "ArtifactError .* expected kernels that the metal device can",
        ),
    ],
    ids=["with all", "no device", "no room", "kernels that do not compile"],
)
def test_with_the_runtime(
    nano_here: Path, tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    output = run_python(LOAD, nano_here, cwd=tmp_path, env=stand_in() | environment).stdout
    assert re.match(re.escape(said).replace(r"\.\*", ".*"), output), output


def test_metal_runtime_that_is_no_library(nano_here: Path, tmp_path: Path) -> None:
    library = runtime_with_metal(tmp_path / "libtvm_runtime.so", b"no library")
    environment = {"OSSCOMPILE_TVM_RUNTIME": str(library)}
    said = run_python(LOAD, nano_here, cwd=tmp_path, env=environment).stdout
    assert "ArtifactError" in said and "expected TVM's runtime for this machine" in said


def runtime_with_metal(library: Path, content: bytes) -> Path:
    """Copy this machine's libtvm_runtime to that name, with something beside it."""
    installed = find_runtime_library()
    assert installed is not None
    library.symlink_to(installed)
    device_library(library, "metal").write_bytes(content)
    return library


def test_bundle_for_a_mac_has_the_metal_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = runtime_with_metal(tmp_path / "libtvm_runtime.dylib", b"for Metal")
    monkeypatch.setenv("OSSCOMPILE_TVM_RUNTIME", str(library))
    folder = bundle_runtime(tmp_path / "bundle")
    assert (folder / "libtvm_runtime_metal.dylib").read_bytes() == b"for Metal"
    assert (folder / "libtvm_runtime.dylib").stat().st_size > 1 << 20


# --- Runs on the stand-in ---------------------------------------------------------------------


@needs_gxx
def test_nano_is_close_to_float64_and_says_what_a_cpu_says(
    nano_here: Path, nano_artifact: Path, record_property: Any
) -> None:
    load_stand_in()
    check_nano(nano_here, nano_artifact, record_property)


@needs_gxx
@options_together
def test_logits_stay_on_the_device(nano_here: Path, option: dict[str, Any]) -> None:
    load_stand_in()
    check_logits_stay(nano_here, option)


@needs_gxx
def test_rows_of_all_kinds(nano_here: Path) -> None:
    load_stand_in()
    check_rows_of_all_kinds(nano_here)


@needs_gxx
def test_broken_weights_show_where_the_device_chooses(nano_here: Path) -> None:
    load_stand_in()
    check_broken_weights_show(nano_here)


@pytest.fixture(scope="module")
def talker(for_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    load_stand_in()
    return compile_talker(METAL.name, tmp_path_factory.mktemp("talker"), None)


@needs_gxx
def test_exact_is_the_reference(talker: Path) -> None:
    check_exact(talker)


@needs_gxx
def test_long_answer_goes_back_by_the_snapshot(talker: Path) -> None:
    model, prompt = load(talker), random_ids(60)
    list(model.generate(prompt, max_tokens=3 * CHUNK))
    test_cache_reuse.check_against_fresh(model, talker, prompt + random_ids(20, seed=1), 3)


@needs_gxx
def test_forgetting_sets_what_was_written_to_zero(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes in pieces that divide no row."""
    monkeypatch.setattr("osscompile.runtime.devices.tvm_memory.PIECE_BYTES", 1000)
    model = load(talker)
    model.prefill(random_ids(100))

    def largest() -> float:
        copies = [tensor.copyto(tvm.cpu()).numpy() for tensor in model._runner.cache.arrays]
        return max(float(np.abs(copy).max()) for copy in copies)

    assert largest() > 0
    model.forget()
    assert largest() == 0


@needs_gxx
def test_without_room_on_the_device(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError("no buffer")

    device = load(talker)._runner.device
    monkeypatch.setattr(device, "_allocate", full)
    with pytest.raises(OsscompileError, match=r"metal: expected room for 0.5 MB more, .*no buffer"):
        device.zeros((2, 1024, 64), "float32")
