"""Tuning: from a model to its records, candidates that win or never do, and interrupts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import flip_byte, leave_libraries_empty
from treacherous_kernel import (
    CRASHES,
    FAST,
    HANGS,
    KNOB,
    SLOW,
    UNBUILDABLE,
    UNSCHEDULABLE,
    WRONG,
    check_ingest,
    emit_tiny,
    measure_alone,
    measured_ways,
)
from treacherous_kernel import offer as offer  # a fixture
from tvm import ir
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

import osscompile
from osscompile import cli, targets
from osscompile.bundle import bundle_runtime
from osscompile.codegen.library import build_library
from osscompile.errors import CompileError
from osscompile.importer.graph import build_graph
from osscompile.importer.resolve import resolve_model
from osscompile.importer.synthetic import TINY
from osscompile.passes.pack_weights import pack_weights
from osscompile.passes.schedule_kernels import schedule_kernels
from osscompile.runtime.errors import OsscompileError, TuningError
from osscompile.runtime.trials import inputs, measure
from osscompile.runtime.trials.files import Plan, Trial, check_files, read_plan
from osscompile.runtime.trials.machines import FUNCTION
from osscompile.runtime.trials.measure import Attempt, attempt_here, measure_kernel
from osscompile.schedules import records as schedule_records
from osscompile.schedules import rule as schedule_rule
from osscompile.schedules.cpu.loops import loops
from osscompile.schedules.cpu.rows import rows as fallback
from osscompile.schedules.formats import DIGIT
from osscompile.schedules.records import Choose, kernel_key
from osscompile.targets import Target
from osscompile.tuning import emit, records, tune
from osscompile.tuning.records import (
    Finding,
    check_records,
    own_records_file,
    read_findings,
    records_of_compile,
    write_records,
)
from osscompile.tuning.workloads import collect_workloads


@pytest.fixture
def emitted(this_machine: Target, tmp_path: Path, offer: Callable[..., None]) -> Path:
    """The folder of the only kernel, with a default and one candidate."""
    offer(SLOW, FAST)
    return emit_tiny(tmp_path / "emitted", this_machine)


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
    assert len(measured) == len(set(measured)) == 6  # 3 candidates for the norm of each function
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


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_emitting_again_makes_damaged_files_whole(
    emitted: Path, this_machine: Target, damage: str
) -> None:
    plan = read_plan(emitted)
    for name in (plan.default.library, plan.answer.file):
        if damage == "missing":
            (emitted / name).unlink()
        else:
            flip_byte(emitted / name, -1)
        with pytest.raises(TuningError, match=rf"{name}: expected sha256"):
            check_files(emitted, plan)
        emit_tiny(emitted.parent, this_machine)
        check_files(emitted, read_plan(emitted))
    measure_kernel(emitted)
    assert measured_ways(emitted) == {FAST}


def test_emitted_is_measured_by_the_bundle_alone_and_ingested(
    emitted: Path, this_machine: Target, tmp_path: Path
) -> None:
    size = sum(f.stat().st_size for f in emitted.parent.rglob("*") if f.is_file())
    assert size < 1 << 20
    far, told = measure_alone(emitted, tmp_path / "far", "tvm", "tqdm")
    assert "kernel 1 of 1" in told and "1 trials done" in told
    known = '{"another kernel": {"depth": 2}}'
    check_ingest(far, this_machine, FAST, tmp_path / "records.json", known)


def test_bundle_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    bundle = bundle_runtime(tmp_path)
    command = [sys.executable, "-m", f"{bundle.name}.measure", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("measure: ") and "tune --emit" in result.stderr
    assert "Traceback" not in result.stderr


# --- Records -----------------------------------------------------------------------------------


def test_kernel_whose_default_is_as_good_loses_its_record(tmp_path: Path) -> None:
    file = tmp_path / "new" / "records.json"
    write_records(file, [Finding("a", 1.0, 0.5, 0.5, {"n": 2}), Finding("b", 1.0, 1.0, 1.0, {})])
    assert json.loads(file.read_text()) == {"a": {"n": 2}}
    write_records(file, [Finding("a", 1.0, 1.0, 1.0, {})])
    assert json.loads(file.read_text()) == {}


@pytest.fixture
def of_user(this_machine: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user of another's package keeps records."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "package" / "records").mkdir(parents=True)
    monkeypatch.setattr(schedule_records, "__file__", str(tmp_path / "package" / "records.py"))
    package = schedule_records.records_file(this_machine)
    monkeypatch.setattr(records, "_can_write", lambda file: file != package)
    return tmp_path / "osscompile" / "records" / package.name


def test_records_of_a_package_that_cannot_be_written(of_user: Path, this_machine: Target) -> None:
    """They are the user's own, and a compile takes them before the package's."""
    assert own_records_file(this_machine) == of_user
    package = {"a": {"n": 1}, "b": {"n": 1}}
    schedule_records.records_file(this_machine).write_text(json.dumps(package))
    schedule_records._records.cache_clear()
    assert records_of_compile(this_machine, None) == (package, None)
    faster = Finding("a", 1.0, 0.5, 0.5, {"n": 2})
    write_records(of_user, [faster, Finding("b", 1.0, 1.0, 1.0, {})], package)
    assert records_of_compile(this_machine, None) == ({"a": {"n": 2}, "b": {}}, of_user)
    other = of_user.with_name("other.json")
    other.write_text('{"c": {"n": 3}}')
    assert records_of_compile(this_machine, other) == (package | {"c": {"n": 3}}, other)


def test_user_without_a_home(this_machine: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that the system knows: a folder named ~ would be made where the command runs."""
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert own_records_file(this_machine) == schedule_records.records_file(this_machine)
    assert records_of_compile(this_machine, None)[1] is None


def test_command_compiles_with_records(
    this_machine: Target,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_libraries_empty(monkeypatch, schedule_kernels)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    file, ir = tmp_path / "r.json", tmp_path / "ir"
    arguments = ["compile", "synthetic:tiny", "-o", str(tmp_path / "out"), "--profile", "exact"]
    arguments += ["--target", this_machine.name, "--context", "64", "--dump", str(ir)]

    def scheduled(*more: str) -> str:
        assert cli.main([*arguments, "--variants", this_machine.variant, *more]) == 0
        (phase,) = (ir / this_machine.variant).glob("*_schedule_kernels.py")
        return phase.read_text()

    default = scheduled()
    assert "before the package's" not in capsys.readouterr().err
    config = resolve_model("synthetic:tiny").source.config
    workloads = collect_workloads(config, "exact", this_machine)
    file.write_text(json.dumps({w.key: {"row_groups_per_task": 2} for w in workloads}))
    assert scheduled("--records", str(file)) != default
    assert f"are from {file}, before the package's" in capsys.readouterr().err
    file.write_text("[]")
    assert cli.main([*arguments, "--variants", this_machine.variant, "--records", str(file)]) == 1
    assert "r.json: expected records" in capsys.readouterr().err
    if len(targets.load_variants(this_machine.name)) > 1:
        assert cli.main([*arguments, "--records", str(file)]) == 1
        assert "expected one variant" in capsys.readouterr().err


def test_records_that_a_compile_does_not_take(
    this_machine: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning tells how many and why: kernels of other models, values and names of other
    versions."""
    leave_libraries_empty(monkeypatch, schedule_kernels)
    config = resolve_model("synthetic:tiny").source.config
    options = {"variants": this_machine.variant, "profile": "exact", "context": 64}
    file = tmp_path / "r.json"
    known: dict[str, tuple[str, Sequence[int]]] = {}  # of a kernel, a constant and its candidates
    for workload in collect_workloads(config, "exact", this_machine):

        def note(
            name: str, candidates: Sequence[int], default: int, key: str = workload.key
        ) -> int:
            known[key] = name, candidates
            return default

        schedule_rule.schedule(workload.function, this_machine, note)
    records = {key: {knob: max(candidates)} for key, (knob, candidates) in known.items()}
    wrong = dict(zip(known, (-1, 0, 10**30, 3), strict=False))
    assert len(wrong) == 4 and all(wrong[key] not in known[key][1] for key in wrong)

    def warnings_of(records: dict[str, dict[str, int]]) -> list[str]:
        file.write_text(json.dumps(records))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = tmp_path / "out"
            osscompile.compile("synthetic:tiny", this_machine.name, output, records=file, **options)
        return [str(w.message) for w in caught if str(file) in str(w.message)]

    assert warnings_of(records) == warnings_of({}) == []
    for key, value in wrong.items():
        records[key] = {known[key][0]: value, "other": 2}
    (told,) = warnings_of(records | {"dense_q8 int8[1,1]": {"n": 1}})
    assert f"expected {len(records) + 1} records to use, found that 1 are of kernels that" in told
    assert "8 constants are none that a schedule has, or no candidates of theirs: " in told
    first, *_ = wrong
    assert f"{known[first][0]}=-1 of {first}, other=2 of {first}" in told


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"n": "2"}}', "\udcff"])
def test_records_that_are_damaged_are_told_before_measuring(tmp_path: Path, text: str) -> None:
    (tmp_path / "records.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CompileError, match=r"expected records of .*, found"):
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
