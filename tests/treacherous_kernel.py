"""A kernel for tests of tuning, whose schedule offers everything that can go wrong."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from osscompile import cli
from osscompile.bundle import bundle_runtime
from osscompile.kernels import rows as kernels
from osscompile.runtime.trials.files import Plan, read_plan, read_trials
from osscompile.schedules import rule as schedule_rule
from osscompile.schedules.cpu import CPU_RULES
from osscompile.schedules.records import Choose
from osscompile.targets import Target
from osscompile.tuning import tune

SLOW, FAST, WRONG, CRASHES, HANGS, UNSCHEDULABLE, UNBUILDABLE = range(7)
KNOB = "way"


def treacherous(ways: tuple[int, ...], default: int = SLOW) -> Callable[..., Schedule | None]:
    """Return a rule for the RMSNorm of prefills that offers these ways to schedule it."""

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
        # This runs on one thread, as the slow way does: threads that wait for each other while
        # other processes have the cores take longer than all repetitions.
        return Schedule(function)

    return rule


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
    """Return a kernel that is right, but does its work many times."""
    again = tirx.Var("again", "int64")
    body = tirx.For(again, tirx.const(0, "int64"), tirx.const(20, "int64"), 0, function.body)
    return function.with_body(body)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the treacherous kernel the only one that has something to tune."""

    def untuned(rule: Any) -> Any:
        @functools.wraps(rule)
        def defaults(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
            return rule(function, target, lambda name, candidates, default: default)

        return defaults

    def set_rules(*ways: int, default: int = SLOW) -> None:
        rules = (treacherous(ways, default), *map(untuned, CPU_RULES))
        monkeypatch.setattr(schedule_rule, "RULES", {"cpu": rules})

    return set_rules


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


def measure_alone(folder: Path, far: Path, *absent: str) -> tuple[Path, str]:
    """Copy an emitted folder to `far`, and measure it there with the runtime alone, which cannot
    import `absent`. Returns the kernel's folder, and the output."""
    bundle = bundle_runtime(far)
    copy = Path(shutil.copytree(folder.parent, far / "emitted"))
    for name in absent:
        (far / f"{name}.py").write_text("raise ImportError('not there')")
    environment = os.environ | {"PYTHONPATH": str(far)}
    environment.pop("OSSCOMPILE_TVM_RUNTIME", None)  # the bundle has its own library
    command = [sys.executable, "-m", f"{bundle.name}.measure", str(copy)]
    result = subprocess.run(
        command, cwd=far.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return copy / folder.name, result.stdout


def check_ingest(folder: Path, target: Target, way: int, output: Path, known: str = "{}") -> None:
    """Check that ingesting records `way` for the kernel, beside known records."""
    output.write_text(known)
    options = ["--target", target.name, "--output", str(output)]
    assert cli.main(["tune", *options, "--ingest", str(folder.parent)]) == 0
    key = read_plan(folder).key
    assert json.loads(output.read_text()) == json.loads(known) | {key: {KNOB: way}}
