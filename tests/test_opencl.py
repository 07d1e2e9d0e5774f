"""Artifacts for OpenCL: their results on this machine's device, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import test_cache_reuse
from artifacts import copy_artifact, flip_byte, reseal, run_python
from device_choices import (
    check_broken_weights_show,
    check_logits_stay,
    check_rows_of_all_kinds,
    every_option_of_the_sampler,
)
from device_models import OF_GPT_OSS, check_exact
from opencl_device import MISSING, OPENCL, needs_opencl
from random_model import read_checkpoint
from talker import CHUNK, compile_talker, random_ids
from test_model_accuracy import NANO, NANO_QUESTIONS, check_fast, nano_answer

import osscompile
from osscompile import cli
from osscompile.codegen.opencl import opencl_source
from osscompile.codegen.programs import build_programs
from osscompile.importer.choice import with_choose
from osscompile.importer.graph import build_graph
from osscompile.importer.synthetic import gpt_oss_config
from osscompile.passes import LAUNCH_PASSES, SHARED_PASSES, run_passes
from osscompile.runtime import load
from osscompile.runtime.artifact import open_artifact
from osscompile.runtime.devices.opencl import OpenCLDevice, _first_device, _import_pyopencl
from osscompile.runtime.devices.program import read_programs, write_programs
from osscompile.runtime.errors import ArtifactError, OsscompileError


@pytest.fixture
def damaged(nano_opencl: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return copy_artifact(nano_opencl, tmp_path)


# --- Results ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_talker(OPENCL.name, tmp_path_factory.mktemp("talker"), None)


@needs_opencl
def test_exact_is_the_reference(talker: Path) -> None:
    check_exact(talker)


@needs_opencl
def test_nano_is_close_to_float64_and_says_what_a_cpu_says(
    nano_opencl: Path, nano_artifact: Path, record_property: Callable[[str, object], None]
) -> None:
    model, on_cpu = load(nano_opencl), load(nano_artifact)
    for question in NANO_QUESTIONS:
        prompt, answer = nano_answer(model, *question)
        assert len(answer) > 3
        assert (prompt, answer) == nano_answer(on_cpu, *question)
    check_fast(model, reference.Model(*read_checkpoint(NANO)), prompt, answer, record_property)


@needs_opencl
def test_command_line(nano_opencl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["What is 17 + 25?", "--reasoning", "low", "--hide-analysis"]
    assert cli.main(["run", str(nano_opencl), *question]) == 0
    assert capsys.readouterr().out.strip() == "17 + 25 = 42."


@needs_opencl
@every_option_of_the_sampler
def test_logits_stay_on_the_device(nano_opencl: Path, option: dict[str, Any]) -> None:
    check_logits_stay(nano_opencl, option)


@needs_opencl
def test_rows_of_all_kinds(nano_opencl: Path) -> None:
    check_rows_of_all_kinds(nano_opencl)


@needs_opencl
def test_broken_weights_show_where_the_device_chooses(nano_opencl: Path) -> None:
    check_broken_weights_show(nano_opencl)


ALONE = """
import sys
from osscompile.runtime import load
print(load(sys.argv[1]).logits(range(3)).shape, {"tvm", "tvm_ffi"} & set(sys.modules))
"""


@needs_opencl
def test_runs_without_tvm(nano_opencl: Path, tmp_path: Path) -> None:
    assert run_python(ALONE, nano_opencl, cwd=tmp_path).stdout.strip() == "(3, 1024) set()"


def test_inspect_and_targets(nano_opencl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(nano_opencl)]) == 0
    assert "any device of opencl" in capsys.readouterr().out
    assert cli.main(["targets"]) == 0
    assert OPENCL.description in capsys.readouterr().out


# --- The cache in the device's memory ---------------------------------------------------------


@needs_opencl
def test_next_turn_goes_back_over_a_long_answer(talker: Path) -> None:
    model, prompt = load(talker), random_ids(60)
    list(model.generate(prompt, max_tokens=3 * CHUNK))
    test_cache_reuse.check_against_fresh(model, talker, prompt + random_ids(20, seed=1), 3)


@needs_opencl
def test_any_history_gives_what_a_fresh_model_gives(talker: Path) -> None:
    test_cache_reuse.test_any_history_gives_what_a_fresh_model_gives(load(talker), talker, 0)


@needs_opencl
def test_forgetting_sets_the_cache_to_zero(talker: Path) -> None:
    model = load(talker)
    model.prefill(random_ids(100))
    device = model._runner.device

    def largest() -> float:
        found = 0.0
        for array, cache in zip(model._runner.cache.arrays, model.manifest.caches, strict=True):
            content = np.empty(array.shape, cache.dtype)
            device.read(array.memory, content)
            found = max(found, float(np.abs(content).max()))
        return found

    assert largest() > 0
    model.forget()
    assert largest() == 0


# --- The shapes of the real models ------------------------------------------------------------


@OF_GPT_OSS
def test_kernels_of_gpt_oss(num_experts: int, profile: str) -> None:
    """Two layers contain every kernel. If there is a device, its compiler takes the source."""
    config = gpt_oss_config(num_layers=2, num_experts=num_experts)
    module = with_choose(build_graph(config, profile, 131072, 512).module, config.vocab_size, 64)
    module = run_passes(module, OPENCL, SHARED_PASSES + LAUNCH_PASSES)
    source, programs = opencl_source(module, OPENCL), build_programs(module)
    launched = {launch.kernel for program in programs.values() for launch in program.launches}
    assert launched == set(re.findall(r"^__kernel void (\w+)\(.*\{$", source, re.MULTILINE))
    assert not re.search(r"\bhalf\b", source.partition("__kernel")[2])  # halves are bits
    for launch in (launch for program in programs.values() for launch in program.launches):
        assert math.prod(launch.threads) <= OPENCL.max_threads
    if MISSING is None:
        cl = _import_pyopencl()
        cl.Program(cl.Context([_first_device(cl)]), source).build()


# --- Refusals ---------------------------------------------------------------------------------


def first_launch(programs: dict[str, Any]) -> dict[str, Any]:
    launch: dict[str, Any] = programs["step"]["launches"][0]
    return launch


def deep_expression(depth: int) -> Any:
    return "tokens" if depth == 0 else ["+", deep_expression(depth - 1), 1]


def set_group(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda programs: first_launch(programs).update(groups=[value])


def set_argument(*argument: Any) -> Callable[[dict[str, Any]], object]:
    return lambda programs: first_launch(programs)["arguments"].__setitem__(0, argument)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no function": (lambda p: p.pop("step_1"), "step_1"),
    "no field": (lambda p: p["step"].pop("storages"), "storages"),
    "functions in a list": (lambda p: p.update(step=[1]), "problem"),
    "storage of no bytes": (lambda p: p["step"]["storages"].__setitem__(0, 0), "storage's size"),
    "storage of too many": (lambda p: p["step"]["storages"].__setitem__(0, 1 << 60), "size"),
    "storage of true bytes": (lambda p: p["step"]["storages"].__setitem__(0, True), "True"),
    "result elsewhere": (lambda p: p["step"].update(result=999), "the result's storage"),
    "result too large": (lambda p: p["step"].update(result_shape=[1 << 20, 1024]), "a result"),
    "result in a small storage": (lambda p: p["step_1"]["storages"].__setitem__(-1, 8), "a result"),
    "fewer tokens": (lambda p: p["step"]["symbols"].update(tokens=511), "'tokens': 512"),
    "another symbol": (lambda p: p["step"]["symbols"].update(rows=1), "'rows': 1"),
    "fewer inputs": (lambda p: p["step"]["inputs"].pop(), "expected the inputs"),
    "short input": (lambda p: p["step"]["inputs"][0].update(shape=[1]), "expected the inputs"),
    "input of another name": (lambda p: p["step_1"]["inputs"][0].update(name="id"), "name='id'"),
    "shared memory of a name": (lambda p: first_launch(p).update(shared_bytes="1"), "shared mem"),
    "much shared memory": (lambda p: first_launch(p).update(shared_bytes=1 << 40), "shared mem"),
    "dependent by a number": (lambda p: first_launch(p).update(dependent=1), "dependent"),
    "result of other rows": (lambda p: p["step"].update(result_shape=[64, 1024]), "a result"),
    "kernel with a blank": (lambda p: first_launch(p).update(kernel="a b"), "name of a kernel"),
    "kernel without a name": (lambda p: first_launch(p).update(kernel=7), "name of a kernel"),
    "unknown input": (set_argument("input", 3), "the input"),
    "unknown weight": (set_argument("bound", 100_000), "the bound"),
    "unknown storage": (set_argument("storage", -1), "the storage"),
    "unknown kind": (set_argument("file", "/etc/passwd"), "kind 'file'"),
    "no scalar": (set_argument("int64", 0.5), "0.5"),
    "int32 of 33 bits": (set_argument("int32", 1 << 31), "found 2147483648"),
    "int32 of 33 bits, times tokens": (set_argument("int32", ["*", "tokens", 1 << 23]), "found"),
    "int64 of 94 bits": (set_argument("int64", ["*", 1 << 47, 1 << 47]), "found 1980704"),
    "int64 of a small difference": (
        set_argument("int64", ["-", ["*", 1 << 47, 4], ["*", 1 << 47, 4]]),
        "expected a number",
    ),
    "too many groups": (set_group(["*", "tokens", 1 << 30]), f"found {1 << 39}"),
    "no group between": (set_group(["-", 5, ["min", "tokens", 6]]), "found -1"),
    "too many threads": (lambda p: first_launch(p).update(threads=[1 << 40]), "threads"),
    "negative groups": (set_group(["-", "tokens", 2]), "found -1"),
    "unknown operator": (set_group(["**", "tokens", 2]), "'**'"),
    "operator that is a list": (set_group([["+"], "tokens", 2]), "problem"),
    "unknown symbol": (set_group("expert_rows"), "expert_rows"),
    "division by zero": (set_group(["//", "tokens", 0]), "a divisor"),
    "division by what may be zero": (set_group(["//", 64, ["-", "tokens", 1]]), "a divisor"),
    "too deep": (set_group(deep_expression(9)), "too deep"),
    "far too deep": (set_group(deep_expression(500)), "too deep"),
    "two arguments of an operator": (set_group(["+", 1]), "problem"),
    "two axes of one": (lambda p: first_launch(p).update(threads=[8, 8]), "2"),
    "four axes": (lambda p: first_launch(p).update(threads=[1] * 4, groups=[1] * 4), "4 axes"),
    "no axes": (lambda p: first_launch(p).update(threads=[], groups=[]), "0 axes"),
    "threads of a symbol": (lambda p: first_launch(p).update(threads=["tokens"]), "threads"),
}


def damage(artifact: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the programs; sizes and hashes are right afterwards."""
    file = artifact / "lib.launches"
    programs = json.loads(file.read_text())
    change(programs)
    file.write_text(json.dumps(programs))
    reseal(artifact)
    return file


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_program(damaged: Path, name: str) -> None:
    """The error comes before a device is looked for."""
    change, words = DAMAGE[name]
    file = damage(damaged, change)
    with pytest.raises(ArtifactError) as caught:
        osscompile.load(damaged)
    assert str(file) in str(caught.value) and words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000, "\xff"])
def test_programs_that_are_none(damaged: Path, text: str) -> None:
    (damaged / "lib.launches").write_bytes(text.encode("latin-1"))
    reseal(damaged)
    with pytest.raises(ArtifactError, match=r"lib.launches: expected programs"):
        osscompile.load(damaged)


@pytest.mark.parametrize("name", ["lib.cl", "lib.launches"])
def test_flipped_byte(damaged: Path, name: str) -> None:
    flip_byte(damaged / name, 1000)
    with pytest.raises(ArtifactError, match=rf"{name}: expected sha256"):
        osscompile.load(damaged)


def test_programs_are_listed(damaged: Path) -> None:
    reseal(damaged, lambda fields: fields["files"].pop("lib.launches"))
    with pytest.raises(ArtifactError, match=r"expected an entry for lib.launches, found none"):
        osscompile.load(damaged)


def test_unknown_runtime(damaged: Path) -> None:
    reseal(damaged, lambda fields: fields.update(runtime="abacus"))
    with pytest.raises(ArtifactError, match=r"expected one of .*opencl.*found 'abacus'"):
        osscompile.load(damaged)


@needs_opencl
@pytest.mark.parametrize(
    "change",
    [
        lambda p: first_launch(p).update(kernel="no_such_kernel"),
        lambda p: first_launch(p)["arguments"].pop(),
        lambda p: first_launch(p).update(threads=[1 << 20]),
        lambda p: first_launch(p).update(arguments=[["int64", 1]] * 5),
    ],
    ids=["name", "arguments", "threads", "scalars"],
)
def test_program_that_does_not_fit_its_kernels(
    damaged: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    damage(damaged, change)
    model = osscompile.load(damaged)
    with pytest.raises(ArtifactError, match=r"lib.cl: expected kernels that .* can run"):
        model.prefill([1, 2, 3])


@needs_opencl
@pytest.mark.parametrize("source", [b"this is no C", b"\xff\xfe"])
def test_source_that_does_not_compile(damaged: Path, source: bytes) -> None:
    (damaged / "lib.cl").write_bytes(source)
    reseal(damaged)
    with pytest.raises(ArtifactError, match=r"lib.cl: expected kernels that .* can run"):
        osscompile.load(damaged)


def test_without_pyopencl(nano_opencl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    with pytest.raises(OsscompileError, match=r"expected the package pyopencl.*pip install"):
        osscompile.load(nano_opencl)


def test_without_a_device(nano_opencl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cl = pytest.importorskip("pyopencl")
    monkeypatch.setattr(cl, "get_platforms", lambda: [])
    with pytest.raises(OsscompileError, match="expected a device, found none; install the driver"):
        osscompile.load(nano_opencl)


@needs_opencl
def test_without_room_on_the_device(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cl = _import_pyopencl()

    def full(*arguments: Any) -> None:
        raise cl.MemoryError("clCreateBuffer", -4)

    monkeypatch.setattr(cl, "Buffer", full)
    with pytest.raises(OsscompileError, match=r"expected room for .* MB more"):
        osscompile.load(talker)


def test_products_of_one_token_read_activations_as_images(nano_opencl: Path) -> None:
    """Prefill reads none as images, because its work-groups share what they loaded."""
    source = (nano_opencl / "lib.cl").read_text()
    parameters = dict(re.findall(r"^__kernel void (\w+)\((.*)\) \{$", source, re.MULTILINE))
    programs = read_programs(open_artifact(nano_opencl))
    of_one, of_many = (
        {launch.kernel for launch in programs[name].launches} for name in ("step_1", "step")
    )
    with_images = {name for name, text in parameters.items() if "image1d_buffer_t" in text}
    products = {
        name
        for name in of_one - of_many
        if {"xs_ptr", "words_ptr"} <= set(re.findall(r"\w+", parameters[name]))
    }
    assert products and products <= with_images
    assert not with_images & (of_many - of_one)


@needs_opencl
def test_device_with_too_small_images(nano_opencl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = OpenCLDevice.open()

    class FewTexels:
        image_support, image_max_buffer_size = 1, 8

        def __getattr__(self, name: str) -> Any:
            return getattr(opened.device, name)

    with_few = dataclasses.replace(opened, device=FewTexels())
    monkeypatch.setattr(OpenCLDevice, "open", staticmethod(lambda: with_few))
    model = osscompile.load(nano_opencl)
    with pytest.raises(ArtifactError, match=r"found: images of \d+ texels, where 8 is the most"):
        model.decode(1)


def test_same_model_gives_the_same_bytes(nano_opencl: Path, tmp_path: Path) -> None:
    again = osscompile.compile("nano", OPENCL.name, tmp_path / "again.osc", context=1024)
    for file in nano_opencl.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_programs_read_back_are_those_written(nano_opencl: Path) -> None:
    artifact = open_artifact(nano_opencl)
    assert write_programs(read_programs(artifact)) == artifact.programs.read_text()
