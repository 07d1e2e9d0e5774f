"""Every kernel of a model, emitted for checks on a device. None is forgotten, each answers for all
its arguments, and a wrong kernel is told while the others are measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_device import H100
from opencl_device import OPENCL, needs_opencl
from smallest_graph import PROFILES, SMALLEST, kernels
from tvm import ir

from osscompile import cli, compiler, targets
from osscompile.importer.synthetic import gpt_oss_config
from osscompile.passes.join_attention import join_attention
from osscompile.passes.join_experts import join_experts
from osscompile.runtime.devices.tvm_cpu import aligned_copy, tensor
from osscompile.runtime.trials import inputs, measure
from osscompile.runtime.trials.files import (
    MAX_BYTES,
    Argument,
    read_answer,
    read_plan,
    read_trials,
    sha256_of,
    write_answer,
)
from osscompile.runtime.trials.inputs import Arrays, checked_inputs
from osscompile.runtime.trials.machines import FUNCTION, Cpu, Launched, TrialMachine
from osscompile.runtime.trials.measure import Failure, compare_and_time
from osscompile.schedules.formats import FACTS
from osscompile.schedules.records import kernel_key
from osscompile.targets import Target
from osscompile.tuning import tune
from osscompile.tuning.emit import folder_name
from osscompile.tuning.workloads import Workload, collect_workloads

LARGE = gpt_oss_config(num_layers=2, num_experts=128)
SMALL = dataclasses.replace(
    SMALLEST,
    vocab_size=192,
    head_dim=32,
    num_experts=8,
    num_experts_per_token=4,
    max_context=600,
)
MODEL = "synthetic:tiny"


class Packed(Exception):
    """Ends a compile where its kernels are about to be scheduled."""

    def __init__(self, module: ir.IRModule) -> None:
        self.module = module


CHOOSING = (
    *("best", "change", "choice", "draw", "limit", "masses", "narrow", "take_logits"),
    "tell_report",
)


def scheduled_by_compile(target: Target, profile: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Count the kernels of each key that a compile schedules."""

    def stop(module: ir.IRModule, *rest: Any) -> None:
        raise Packed(module)

    monkeypatch.setattr(compiler, "_build_libraries", stop)
    with pytest.raises(Packed) as stopped:
        compiler.compile(MODEL, target.name, "unwritten.osc", profile=profile)
    module = join_experts(join_attention(stopped.value.module, target), target)
    return Counter(map(kernel_key, kernels(module).values()))


def collect(target: Target, profile: str) -> list[Workload]:
    return collect_workloads(SMALL, profile, target)


# --- All kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        *(("x86", "fast"), ("x86", "exact"), ("apple", "fast")),
        *((OPENCL.name, "exact"), ("h100", "fast"), ("h100", "exact")),
    ],
)
def test_every_kernel_that_a_compile_schedules_is_emitted(
    name: str, profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = targets.load_variants(name)[0]
    monkeypatch.chdir(tmp_path)
    emitted: dict[str, str] = {}

    def emit_kernel(folder: Path, workload: Workload, *rest: Any) -> None:
        emitted[folder.name] = workload.key

    monkeypatch.setattr(tune, "emit_kernel", emit_kernel)
    count = tune.emit(tmp_path / "emitted", target, [MODEL], profile, 0)
    expected = scheduled_by_compile(target, profile, monkeypatch)
    assert Counter(emitted.values()) == expected and count == expected.total()


def test_arguments_of_the_largest_model_are_not_too_large() -> None:
    for workload in collect_workloads(LARGE, "exact", OPENCL):
        assert sum(a.num_bytes(a.shape) for a in workload.arguments) < MAX_BYTES, workload.key


def test_kernels_of_the_same_shapes_that_differ_have_folders_of_their_own() -> None:
    """Sorting by 8 and by 128 experts takes arguments of the same shapes."""
    more = dataclasses.replace(SMALL, num_experts=128)
    some, others = (
        {w.key: folder_name(w) for w in collect_workloads(config, "fast", OPENCL)}
        for config in (SMALL, more)
    )
    different = {key.split()[0] for key in some.keys() & others if some[key] != others[key]}
    assert different == {"sort_by_expert"}


def test_every_argument_counts() -> None:
    """A kernel's result changes when the numbers of an argument change places, so that an error
    there would show."""
    kernels_of = {
        (str(w.function.attrs["op"]), *(a.name for a in w.arguments)): w
        for target, profile in [*((OPENCL, p) for p in PROFILES), (H100, "fast")]
        for w in collect(target, profile)
    }
    assert len(kernels_of) > 20
    for workload in kernels_of.values():
        module = ir.IRModule({FUNCTION: workload.function.with_attr("global_symbol", FUNCTION)})
        kernel = tvm.compile(module, tvm.target.Target("llvm"))[FUNCTION]
        right_inputs = checked_inputs(workload.arguments)
        right = results(workload, kernel, right_inputs)
        for i, argument in enumerate(workload.arguments):
            changed = moved(right_inputs[i])
            unread = argument.name == "xoffset" and "dense" in workload.key
            # options of rows decide which others count: test_kernels_choose.py tries them all
            unread |= workload.key.startswith(CHOOSING)
            unread |= argument.name == "tiles"  # the unscheduled kernel goes row by row
            if argument.written or unread or np.array_equal(changed, right_inputs[i]):
                continue
            others = [*right_inputs[:i], changed, *right_inputs[i + 1 :]]
            error = measure._error(results(workload, kernel, others), right)
            assert error > measure.TOLERANCE, (workload.key, argument.name, error)


def moved(array: np.ndarray) -> np.ndarray:
    """Move every number to its neighbour's place, or what a step is told of a row to the next row;
    a single one is halved."""
    if array.dtype == np.int32 and array.shape[1:] == (FACTS,) and len(array) > 1:
        return np.roll(array, 1, axis=0)
    if array.size > 1 and array.shape != (1, FACTS):
        return np.roll(array.reshape(-1), 1).reshape(array.shape)
    return (array / 2).astype(array.dtype)


def results(workload: Workload, kernel: Any, arrays: Arrays) -> Arrays:
    arrays = [aligned_copy(array) for array in arrays]
    kernel(*map(tensor, arrays))
    return [x for x, a in zip(arrays, workload.arguments, strict=True) if a.written]


# --- Right and wrong --------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrialMachine], None]:
    """Let measuring take a few calls in this process, on a given machine."""

    def set_machine(machine: TrialMachine) -> None:
        def attempt(folder: Path, libraries: list[str]) -> Any:
            failures: list[Failure] = []

            def tell(message: tuple[Any, ...]) -> None:
                if message[0] == "failed":
                    failures.append(Failure(*message[1:]))

            return compare_and_time(folder, libraries, machine, tell), failures

        for module in (cli.tune, measure):
            monkeypatch.setattr(module, "attempt_here", lambda threads: attempt)

    monkeypatch.setattr(measure, "BURST_SECONDS", 0.0)
    monkeypatch.setattr(measure, "ROUNDS", (1, 1))
    monkeypatch.setattr(inputs, "COLD_BYTES", 1)
    return set_machine


def emit_small(directory: Path, target: Target, ops: tuple[str, ...]) -> Path:
    """Emit the small configuration's kernels of these operations."""

    def chosen(config: Any, profile: str, target: Target) -> list[Workload]:
        return [w for w in collect(target, profile) if w.function.attrs["op"] in ops]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "collect_workloads", chosen)
        tune.emit(directory, target, [MODEL], "fast", 0)
    return directory


@pytest.fixture(scope="module")
def emitted(this_machine: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of emitted kernels. Copy it before you change it."""
    ops = ("append_kv", "sort_by_expert", "take_rows")
    return emit_small(tmp_path_factory.mktemp("checks") / "emitted", this_machine, ops)


def spoil(folder: Path) -> None:
    """Change the answer by the least that must not pass."""
    plan = read_plan(folder)
    arrays = [array.copy() for array in read_answer(folder, plan)]
    last = arrays[0].reshape(-1)
    last[np.flatnonzero(last)[-1]] += 1
    write_answer(folder / plan.answer.file, arrays)
    fields = json.loads((folder / "plan.json").read_text())
    fields["answer"]["sha256"] = sha256_of(folder / plan.answer.file)
    (folder / "plan.json").write_text(json.dumps(fields))


def test_kernels_that_are_wrong_are_told_and_the_others_measured(
    emitted: Path,
    this_machine: Target,
    quick: Callable[[TrialMachine], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both command lines tell them, and records of constants stay as they are."""
    quick(Cpu(1))
    directory = Path(shutil.copytree(emitted, tmp_path / "copy"))
    folders = sorted(file.parent for file in directory.glob("*/plan.json"))
    wrong = [next(f for f in folders if f.name.startswith(op)) for op in ("append", "sort_by")]
    for folder in wrong:
        spoil(folder)
    assert cli.main(["tune", "--measure", str(directory)]) == 1
    captured = capsys.readouterr()
    assert f"told above: {', '.join(f.name for f in wrong)};" in captured.err
    for folder in folders:
        if folder in wrong:
            assert f"{folder}: expected the kernel's default to work, found: wrong" in captured.out
        else:
            assert f"{folder.name}: the default is right, " in captured.out
            assert len(read_trials(folder, read_plan(folder))) == 1
    monkeypatch.setattr(sys, "argv", ["measure", str(directory)])
    assert measure.main() == 1
    assert f"2 of {len(folders)} kernels: {wrong[0].name}, {wrong[1].name}" in (
        capsys.readouterr().err
    )
    output = tmp_path / "records.json"
    output.write_text(json.dumps({read_plan(folders[-1]).key: {"n": 2}}))
    options = ["--target", this_machine.name, "--output", str(output)]
    assert cli.main(["tune", *options, "--ingest", str(directory)]) == 0
    assert json.loads(output.read_text()) == {read_plan(folders[-1]).key: {"n": 2}}


@needs_opencl
def test_kernels_that_only_devices_have(
    quick: Callable[[TrialMachine], None], tmp_path: Path
) -> None:
    quick(Launched(OPENCL.runtime))
    ops = ("draw", "narrow", "choice", "append_kv", "take_logits", "change_logits", "best_logits")
    ops += ("limit_sums", "limit_decide", "limit_finish", "best_of", "masses", "tell_report")
    assert cli.main(["tune", "--measure", str(emit_small(tmp_path, OPENCL, ops))]) == 0


def test_numbers_in_few_places_are_compared_with_what_is_there() -> None:
    """A number may be rounded to its neighbour."""
    right = np.zeros((1 << 14, 64), np.float16)
    right[7] = np.linspace(1, 2, 64)
    rounded, wrong = right.copy(), right.copy()
    rounded[7] = np.nextafter(right[7], np.float16(9))
    wrong[7, 3] = np.nextafter(rounded[7, 3], np.float16(9))
    assert measure._error([rounded], [right]) == 0
    assert measure._error([wrong], [right]) > measure.TOLERANCE
    stray = right.copy()
    stray[8, 5] = 0.001
    assert measure._error([stray], [right]) > measure.TOLERANCE


def test_experts_that_are_not_chosen_are_not_read() -> None:
    def argument(*shape: int, fill: str = "bits", high: int = 0) -> Argument:
        return Argument("x", "int32", shape, shape, fill, 0, high)

    rows, words = argument(4, fill="experts", high=8), argument(8, 100)
    assert inputs.moved_bytes([rows, words]) == 4 * (4 + 400)
    assert inputs.moved_bytes([argument(1, fill="indices", high=8), words]) is None


def test_trials_are_for_tuning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options in (["--trials", "0"], ["--trials", "-1", "--emit", str(tmp_path)]):
        assert cli.main(["tune", "--work", str(tmp_path), *options]) == 1
        assert "trials: expected at least " in capsys.readouterr().err
