"""Tuning: what wins, what never does, what an interrupt leaves, and folders that are damaged.

The kernel tuned here is one whose schedule offers everything that can go wrong.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import ir, tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from osscompile import cli, targets
from osscompile.build import build_library
from osscompile.bundle import bundle_runtime
from osscompile.errors import CompileError
from osscompile.importer.graph import build_graph
from osscompile.importer.synthetic import TINY, gpt_oss_config
from osscompile.kernels import rows as kernels
from osscompile.passes.pack_weights import pack_weights
from osscompile.passes.schedule_kernels import schedule_kernels
from osscompile.runtime import inputs, measure
from osscompile.runtime.errors import OsscompileError, TuningError
from osscompile.runtime.measure import Attempt, attempt_here, measure_kernel
from osscompile.runtime.trial_machines import FUNCTION
from osscompile.runtime.trials import Plan, Trial, read_plan, read_trials
from osscompile.schedules import records as schedule_records
from osscompile.schedules import rule as schedule_rule
from osscompile.schedules.cpu import CPU_RULES
from osscompile.schedules.cpu.loops import loops
from osscompile.schedules.cpu.rows import rows as fallback
from osscompile.schedules.formats import DIGIT, FP4_OFFSET
from osscompile.schedules.records import Choose, kernel_key
from osscompile.targets import Target
from osscompile.tuning import emit, space, tune
from osscompile.tuning.records import Finding, check_records, read_findings, write_records
from osscompile.tuning.workloads import collect_workloads

SLOW, FAST, WRONG, CRASHES, HANGS, UNSCHEDULABLE, UNBUILDABLE = range(7)
KNOB = "way"


def crashing(function: PrimFunc) -> PrimFunc:
    hidden = function.params[1].shape[0]
    tokens = function.params[0].shape[0]

    @T.prim_func(private=True, s_tir=True)
    def crash(
        x: T.Buffer((tokens, hidden), "float32"),
        weight: T.Buffer((hidden,), "float32"),
        out: T.Buffer((tokens, hidden), "float32"),
    ) -> None:
        for i in range(tokens):
            out[i, 0] = x[i, T.int64(1 << 40)]

    return crash


def hanging(function: PrimFunc) -> PrimFunc:
    hidden = function.params[1].shape[0]
    tokens = function.params[0].shape[0]

    @T.prim_func(private=True, s_tir=True)
    def hang(
        x: T.Buffer((tokens, hidden), "float32"),
        weight: T.Buffer((hidden,), "float32"),
        out: T.Buffer((tokens, hidden), "float32"),
    ) -> None:
        for i in range(T.int64(1 << 50)):
            out[0, 0] = out[0, 0] * x[0, 0] + weight[i % 8]

    return hang


def repeated(function: PrimFunc) -> PrimFunc:
    """Right, but done many times over."""
    again = tirx.Var("again", "int64")
    body = tirx.For(again, tirx.const(0, "int64"), tirx.const(20, "int64"), 0, function.body)
    return function.with_body(body)


def treacherous(ways: tuple[int, ...], default: int = SLOW) -> Callable[..., Schedule | None]:
    """A rule for the RMSNorm of prefills that offers these ways to schedule it."""

    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
        if str(function.attrs["op"]) != "rms_norm" or not isinstance(
            function.params[0].shape[0], tirx.Var
        ):
            return None
        way = choose(KNOB, ways, default)
        hidden = int(function.params[1].shape[0])
        if way == SLOW:
            return Schedule(repeated(function))
        if way == WRONG:
            tokens = function.params[0].shape[0]
            return Schedule(kernels.rms_norm(tokens, hidden, 0.5))  # another epsilon
        if way == CRASHES:
            return Schedule(crashing(function).with_attr("op", "rms_norm"))
        if way == HANGS:
            return Schedule(hanging(function).with_attr("op", "rms_norm"))
        if way == UNSCHEDULABLE:
            raise ValueError("no such loop")
        if way == UNBUILDABLE:
            return Schedule(function.with_attr("unbuildable", True))
        return fallback(function, target, choose)

    return rule


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the treacherous kernel the only one with something to tune."""

    def untuned(rule: Any) -> Any:
        @functools.wraps(rule)
        def defaults(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
            return rule(function, target, lambda name, candidates, default: default)

        return defaults

    def set_rules(*ways: int, default: int = SLOW) -> None:
        rules = (treacherous(ways, default), *map(untuned, CPU_RULES))
        monkeypatch.setattr(schedule_rule, "RULES", {"cpu": rules})

    return set_rules


@pytest.fixture
def emitted(this_machine: Target, tmp_path: Path, offer: Callable[..., None]) -> Path:
    """The folder of the one kernel, with a default and one candidate."""
    offer(SLOW, FAST)
    return emit_tiny(tmp_path / "emitted", this_machine)


def emit_tiny(directory: Path, target: Target, trials: int = 8) -> Path:
    tune.emit(directory, target, ["synthetic:tiny"], "exact", trials)
    (folder,) = (file.parent for file in directory.glob("*/plan.json"))
    return folder


def way_of(plan: Plan, library: str) -> int:
    (way,) = (c.constants[KNOB] for c in plan.candidates if c.library == library)
    return way


def measured_ways(folder: Path) -> set[int]:
    plan = read_plan(folder)
    return {way_of(plan, library) for library in read_trials(folder, plan)}


# --- From a model to its records --------------------------------------------------------------


def test_records_of_tuning_are_what_the_next_compile_takes(
    this_machine: Target,
    offer: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(SLOW, FAST)
    monkeypatch.setattr(schedule_records, "__file__", str(tmp_path / "records.py"))
    schedule_records._records.cache_clear()
    options = ["--target", this_machine.name, "--model", "synthetic:tiny", "--trials", "4"]
    options += ["--profile", "exact"]
    assert cli.main(["tune", *options, "--work", str(tmp_path / "work")]) == 0
    out = capsys.readouterr().out
    assert f"{KNOB}={FAST}" in out and "wrote 1 records" in out

    graph = build_graph(TINY, "exact", TINY.max_context, 512)
    module = pack_weights(graph.module, this_machine)
    found = json.loads(schedule_records.records_file(this_machine).read_text())
    (key,) = found
    (name,) = (n for n, f in module.functions_items() if is_kernel(f, key))
    tuned = schedule_kernels(module, this_machine)[name]
    schedule_records._records.cache_clear()
    schedule_records.records_file(this_machine).unlink()
    untuned = schedule_kernels(module, this_machine)[name]
    assert "again" in untuned.script() and "again" not in tuned.script()


def is_kernel(function: Any, key: str) -> bool:
    return isinstance(function, PrimFunc) and kernel_key(function) == key


def test_large_models_are_tuned_without_kernels_twice(this_machine: Target) -> None:
    configs = [gpt_oss_config(num_layers=n, num_experts=e) for n, e in ((24, 32), (36, 128))]
    small, large = (collect_workloads(c, "fast", this_machine) for c in configs)
    for found in (small, large):
        keys = [workload.key for workload in found]
        assert len(keys) == len(set(keys)) >= 6
        ops = {str(workload.function.attrs["op"]) for workload in found}
        assert ops >= {"dense_q8", "moe_mxfp4_sum_q8", "moe_mxfp4_swiglu_q8"}
    assert {w.key for w in small} & {w.key for w in large}  # dense layers are the same


def test_weights_are_cold_but_take_no_more_memory_than_there_is(this_machine: Target) -> None:
    """By size alone: nothing of it is allocated here."""
    config = gpt_oss_config(num_layers=36, num_experts=128)
    for workload in collect_workloads(config, "fast", this_machine):
        turns, share = inputs.count_turns(workload.arguments)
        once = sum(a.num_bytes(a.shape) for a in workload.arguments if not a.written)
        assert once * math.ceil(turns * share) < 1300 << 20, workload.key
        assert turns * share * once >= inputs.COLD_BYTES or turns == inputs.MAX_TURNS, workload.key


def test_experts_of_following_calls_differ() -> None:
    argument = expert_argument(num_experts=8, rows=4)
    calls = [inputs._experts(argument, (4,), turn).tolist() for turn in range(3)]
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert inputs._experts(argument, (4,), 0, repeated=True).tolist() == [0, 0, 1, 1]


def expert_argument(num_experts: int, rows: int) -> Any:
    return inputs.Argument("row_expert", "int32", (rows,), (3,), "experts", 0, num_experts)


@pytest.mark.parametrize("num_digits", [1, 3])
def test_offsets_belong_to_the_numbers(num_digits: int) -> None:
    digits = (num_digits,) if num_digits > 1 else ()
    shape, low, high = (5, 2), DIGIT, FP4_OFFSET
    arguments = (
        inputs.Argument("xq", "int8", (*shape, *digits, 32), (1,), "integers", -60, 61),
        inputs.Argument("xoffset", "int32", shape, (1,), "offsets", low, high),
    )
    arrays = [inputs.make_array(a, a.shape) for a in arguments]
    inputs._set_offsets(arguments, arrays)
    whole = arrays[0].astype(np.int64)
    if digits:
        whole = whole[:, :, 0] * DIGIT**2 + whole[:, :, 1] * DIGIT + whole[:, :, 2]
    np.testing.assert_array_equal(arrays[1], FP4_OFFSET * whole.sum(axis=-1))


@pytest.mark.parametrize("numbers", [(), (5, 2), (5, 3, 32), (5, 2, 1, 3, 32)])
def test_plan_whose_offsets_belong_to_no_numbers(copy: Path, numbers: tuple[int, ...]) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    template = plan["arguments"][0]

    def argument(name: str, dtype: str, shape: tuple[int, ...], fill: str) -> dict[str, Any]:
        shapes = {"shape": shape, "check_shape": shape}
        bounds = {"low": DIGIT, "high": 1000, "written": False}
        return template | {"name": name, "dtype": dtype, "fill": fill} | shapes | bounds

    plan["arguments"].append(argument("xoffset", "int32", (5, 2), "offsets"))
    if numbers:
        plan["arguments"].append(argument("xq", "int8", numbers, "integers"))
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(TuningError, match="offsets"):
        read_plan(copy)


# --- The space ---------------------------------------------------------------------------------


def test_space_is_enumerated_where_later_questions_depend_on_earlier_answers() -> None:
    asked: list[dict[str, int]] = []

    def answer(choose: Choose) -> None:
        point = {"a": choose("a", (1, 2, 3), 1)}
        if point["a"] == 2:
            point["b"] = choose("b", (5, 6), 5)
        asked.append(point)

    assert len(list(space._every_point(answer))) == 4
    assert asked == [{"a": 1}, {"a": 2, "b": 5}, {"a": 2, "b": 6}, {"a": 3}]


def test_large_space_is_sampled_the_same_every_time(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule:
        numbers = [choose(f"digit {i}", range(10), 0) for i in range(3)]
        return Schedule(function.with_attr("numbers", numbers))

    monkeypatch.setattr(schedule_rule, "RULES", {"cpu": (rule,)})
    function = kernels.rms_norm(1, 64, 1e-5)
    points = space.choose_points(function, this_machine, 20)
    assert len({p.program for p in points}) == len(points) == 21
    assert set(points[0].constants.values()) == {0}  # the default comes first
    assert [p.program for p in space.choose_points(function, this_machine, 20)] == [
        p.program for p in points
    ]


def test_constants_that_give_the_same_program_are_one_point(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule:
        return Schedule(function.with_attr("half", choose("n", range(8), 0) // 2))

    monkeypatch.setattr(schedule_rule, "RULES", {"cpu": (rule,)})
    points = space.choose_points(kernels.rms_norm(1, 64, 1e-5), this_machine, 20)
    assert len(points) == 4


# --- Candidates that must not win --------------------------------------------------------------


def test_candidates_that_fail_in_any_way_are_told_and_not_kept(
    this_machine: Target,
    offer: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(module: ir.IRModule, target: Target, file: Path) -> None:
        if "unbuildable" in module[FUNCTION].attrs:
            raise CompileError("linking failed")
        build_library(module, target, file)

    monkeypatch.setattr(emit, "build_library", build)
    monkeypatch.setattr(measure, "TIMEOUT_SECONDS", 5)
    offer(SLOW, WRONG, CRASHES, HANGS, UNSCHEDULABLE, UNBUILDABLE)
    folder = emit_tiny(tmp_path / "emitted", this_machine)
    told: list[str] = []
    measure_kernel(folder, report=told.append)
    assert measured_ways(folder) == set()
    told += capsys.readouterr().out.splitlines()
    for way, reason in (
        (WRONG, "wrong: off by"),
        (CRASHES, "ended the measuring process"),
        (HANGS, "no answer for 5 seconds"),
        (UNSCHEDULABLE, "cannot be scheduled"),
        (UNBUILDABLE, "no library: linking failed"),
    ):
        assert any(f"{{'{KNOB}': {way}}}" in line and reason in line for line in told), told


def test_wrong_candidate_beside_a_right_one_does_not_win(
    this_machine: Target, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(SLOW, WRONG, FAST)
    folder = emit_tiny(tmp_path / "emitted", this_machine)
    measure_kernel(folder)
    assert measured_ways(folder) == {FAST}
    (finding,) = read_findings([folder], this_machine)
    assert finding.constants == {KNOB: FAST} and finding.ratio < 0.9


def test_whole_numbers_may_be_rounded_to_another_but_no_block_may_be_wrong() -> None:
    right = np.random.default_rng(0).integers(-127, 128, (21, 90, 32)).astype(np.int8)
    rounded, wrong = right.copy(), right.copy()
    rounded[3, 5, 7] ^= 1
    wrong[3, 5] = -wrong[3, 5]
    assert (
        0
        < measure._error([rounded], [right])
        < measure.TOLERANCE
        < measure._error([wrong], [right])
    )
    digits = np.array([[[[1, -1], [-64, 63], [63, -64]]]], np.int8)
    assert inputs.whole_numbers(digits, DIGIT).tolist() == [[[8255, -8384]]]
    assert inputs.whole_numbers(right, DIGIT).dtype == np.int32


def test_wrong_default_stops_the_tuning(
    this_machine: Target, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(WRONG, FAST, default=WRONG)
    folder = emit_tiny(tmp_path / "emitted", this_machine)
    with pytest.raises(TuningError, match="expected the kernel's default to work, found: wrong"):
        measure_kernel(folder)


def test_kernel_whose_default_is_wrong_does_not_keep_others_from_being_measured(
    this_machine: Target,
    offer: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(WRONG, FAST, default=WRONG)
    bad = emit_tiny(tmp_path / "bad", this_machine)
    offer(SLOW, FAST)
    good = emit_tiny(tmp_path / "good", this_machine)
    both = tmp_path / "both"
    for name, folder in (("a", bad), ("b", good)):
        shutil.copytree(folder, both / name)
    assert cli.main(["tune", "--measure", str(both)]) == 1
    captured = capsys.readouterr()
    assert "default to work, found: wrong" in captured.out and "told above: a;" in captured.err
    assert measured_ways(both / "b") == {FAST} and not (both / "a" / "results.json").exists()
    (both / "b" / "results.json").unlink()
    monkeypatch.setattr(sys, "argv", ["measure", str(both)])
    assert measure.main() == 1
    assert "default to work, found: wrong" in capsys.readouterr().err
    assert measured_ways(both / "b") == {FAST}


def test_slower_candidate_gives_no_record(
    this_machine: Target, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(SLOW, FAST, default=FAST)
    folder = emit_tiny(tmp_path / "emitted", this_machine)
    measure_kernel(folder)
    assert measured_ways(folder) == {SLOW}
    assert read_findings([folder], this_machine)[0].constants == {}


# --- Interrupts --------------------------------------------------------------------------------


def test_interrupted_tuning_goes_on_without_repeating_trials(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule:
        sch = fallback(function, target, choose)
        if str(function.attrs["op"]) == "route" or sch is None:
            return Schedule(function)
        if str(function.attrs["op"]) == "rms_norm":
            function = sch.mod["main"].with_attr("number", choose("number", range(4), 0))
            return Schedule(function)
        return sch

    def only_blocks(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
        return loops(function, target, choose)

    monkeypatch.setattr(schedule_rule, "RULES", {"cpu": (only_blocks, rule)})
    monkeypatch.setattr(measure, "BATCH", 2)
    measured: list[str] = []

    def batch(folder: Path, plan: Plan, libraries: list[str], attempt: Attempt) -> Any:
        if len(measured) == 2:
            measured.append("interrupt")
            raise KeyboardInterrupt
        measured.extend(libraries)
        return {library: Trial(1.0, 1.0, 1.0, 0.0) for library in libraries}, []

    monkeypatch.setattr(measure, "_measure_batch", batch)
    what = (this_machine, ["synthetic:tiny"], "exact", 8, attempt_here(None))
    with pytest.raises(KeyboardInterrupt):
        tune.tune(tmp_path, *what)
    assert tune.tune(tmp_path, *what)
    measured.remove("interrupt")
    assert len(measured) == len(set(measured)) == 6  # 3 candidates of the norms of both functions
    tune.tune(tmp_path, *what)
    assert len(measured) == 6


def test_results_of_another_default_are_not_used(
    emitted: Path, this_machine: Target, offer: Callable[..., None]
) -> None:
    measure_kernel(emitted)
    assert measured_ways(emitted) == {FAST}
    offer(SLOW, FAST, default=FAST)
    emit_tiny(emitted.parent, this_machine)
    assert measured_ways(emitted) == set()


def test_libraries_are_not_built_again(
    emitted: Path, this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emit, "build_library", lambda *_: pytest.fail("built again"))
    emit_tiny(emitted.parent, this_machine)


# --- On a machine without the compiler ---------------------------------------------------------


def test_emitted_is_measured_by_the_bundle_alone_and_ingested(
    emitted: Path, this_machine: Target, tmp_path: Path
) -> None:
    size = sum(f.stat().st_size for f in emitted.parent.rglob("*") if f.is_file())
    assert size < 1 << 20
    bundle = bundle_runtime(tmp_path / "far")
    far = shutil.copytree(emitted.parent, tmp_path / "far" / "emitted")
    (tmp_path / "far" / "tvm.py").write_text("raise ImportError('there is no compiler here')")
    (tmp_path / "far" / "tqdm.py").write_text("raise ImportError('there is no tqdm here')")
    command = [sys.executable, "-m", f"{bundle.name}.measure", str(far)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "far")}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "kernel 1 of 1" in result.stdout and "1 trials done" in result.stdout

    output = tmp_path / "records.json"
    output.write_text('{"another kernel": {"depth": 2}}')
    options = ["--target", this_machine.name, "--output", str(output)]
    assert cli.main(["tune", *options, "--ingest", str(far)]) == 0
    key = read_plan(emitted).key
    assert json.loads(output.read_text()) == {"another kernel": {"depth": 2}, key: {KNOB: FAST}}


def test_bundle_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    bundle = bundle_runtime(tmp_path)
    command = [sys.executable, "-m", f"{bundle.name}.measure", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("measure: ") and "tune --emit" in result.stderr
    assert "Traceback" not in result.stderr


# --- Folders that are damaged or not for here --------------------------------------------------


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A plan and results that may be damaged in copies."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            here = targets.of_this_machine()
        except targets.TargetError as error:
            pytest.skip(str(error))
        rules = (treacherous((SLOW, FAST)), loops, fallback)
        patch.setattr(schedule_rule, "RULES", {"cpu": rules})
        folder = emit_tiny(tmp_path_factory.mktemp("planned"), here)
    measure_kernel(folder)
    yield folder


@pytest.fixture
def copy(planned: Path, tmp_path: Path) -> Path:
    return shutil.copytree(planned, tmp_path / "copy")


def change(file: Path, *path: Any, value: Any) -> None:
    fields = json.loads(file.read_text())
    inner = functools.reduce(lambda part, key: part[key], path[:-1], fields)
    inner[path[-1]] = value
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format_version",), 1),
        (("cpu_features",), None),
        (("arguments",), []),
        (("candidates",), []),
        (("key",), 3),
        (("unknown",), 3),
        (("candidates", 0, "library"), "../plan.json"),
        (("candidates", 0, "constants"), {KNOB: "1"}),
        (("arguments", 0, "dtype"), "float64"),
        (("arguments", 0, "shape"), [512]),
        (("arguments", 0, "shape"), [512, 0]),
        (("arguments", 0, "shape"), [512, 1 << 30]),
        (("arguments", 0, "shape"), [512.0, 64]),
        (("arguments", 0, "fill"), "chaos"),
        (("arguments", 0, "high"), 1 << 40),
        (("arguments", 0), "x"),
    ],
)
def test_damaged_plan(copy: Path, path: tuple[Any, ...], value: Any) -> None:
    change(copy / "plan.json", *path, value=value)
    with pytest.raises(TuningError, match=r"plan.json: expected .*, found"):
        measure_kernel(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100000])
def test_files_that_are_not_json_objects(copy: Path, this_machine: Target, text: str) -> None:
    for name in ("results.json", "plan.json"):
        (copy / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(TuningError, match=rf"{name}: expected a JSON object"):
            read_findings([copy], this_machine)


@pytest.mark.parametrize("value", [None, "fast", float("nan"), -1.0])
def test_damaged_results(copy: Path, this_machine: Target, value: Any) -> None:
    (library,) = json.loads((copy / "results.json").read_text())["trials"]
    change(copy / "results.json", "trials", library, "ratio", value=value)
    with pytest.raises(TuningError, match=r"results.json: expected the fields of results"):
        read_findings([copy], this_machine)


def test_library_that_was_swapped_is_not_loaded(copy: Path) -> None:
    default, other = (copy / c.library for c in read_plan(copy).candidates)
    shutil.copyfile(default, other)
    with pytest.raises(TuningError, match=rf"{other.name}: expected sha256"):
        measure_kernel(copy)


def test_library_that_is_missing(copy: Path) -> None:
    (copy / read_plan(copy).default.library).unlink()
    with pytest.raises(TuningError, match="found no such file"):
        measure_kernel(copy)


def test_folder_without_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--measure", str(tmp_path)]) == 1
    assert "expected a folder that `osscompile tune --emit` wrote" in capsys.readouterr().err


def test_machine_without_the_cpu_features(copy: Path) -> None:
    (copy / "results.json").unlink()
    change(copy / "plan.json", "cpu_features", value=["flux_capacitor"])
    with pytest.raises(TuningError, match="this one lacks flux_capacitor"):
        measure_kernel(copy)


def test_machine_of_another_architecture(copy: Path) -> None:
    (copy / "results.json").unlink()
    change(copy / "plan.json", "architecture", value="riscv64")
    with pytest.raises(TuningError, match="made for Linux on riscv64, this machine is"):
        measure_kernel(copy)


def test_results_of_another_target(copy: Path, this_machine: Target) -> None:
    change(copy / "plan.json", "target", value="other")
    with pytest.raises(TuningError, match=rf"expected results for {this_machine.name}"):
        read_findings([copy], this_machine)


# --- Records -----------------------------------------------------------------------------------


def test_kernel_whose_default_is_as_good_loses_its_record(tmp_path: Path) -> None:
    file = tmp_path / "new" / "records.json"
    write_records(file, [Finding("a", 1.0, 0.5, 0.5, {"n": 2}), Finding("b", 1.0, 1.0, 1.0, {})])
    assert json.loads(file.read_text()) == {"a": {"n": 2}}
    write_records(file, [Finding("a", 1.0, 1.0, 1.0, {})])
    assert json.loads(file.read_text()) == {}


@pytest.mark.parametrize("text", ["", "[]"])
def test_records_that_are_damaged_are_told_before_measuring(tmp_path: Path, text: str) -> None:
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(CompileError, match="expected records, found"):
        check_records(tmp_path / "records.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "abacus"], "found 'abacus'"),
        (["--variant", "abacus"], "found 'abacus'"),
        (["--profile", "abacus"], "found 'abacus'"),
        (["--trials", "0"], "expected at least 1, found 0"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "r.json"), "--work", str(tmp_path / "w")]
    assert cli.main(["tune", *output, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_tuning_errors_are_ours() -> None:
    assert issubclass(TuningError, OsscompileError)


def test_random_inputs_are_the_same_on_every_machine() -> None:
    argument = inputs.Argument("x", "float32", (4, 5), (4, 5), "normal")
    first, second = (inputs.make_array(argument, (4, 5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.ctypes.data % 64 == 0 and np.isfinite(first).all()
