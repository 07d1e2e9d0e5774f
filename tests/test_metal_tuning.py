"""Tuning for Metal: libraries built for a Mac are inspected. With this machine's CPU as the host,
candidates are measured on the stand-in for TVM's Metal runtime."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_tuning_devices
from metal_device import METAL, check_compiles, needs_gxx, on_this_machine, stand_in
from test_cross_compile import ARM64, DYLIB, MACH_O_64
from test_metal import for_here as for_here  # a fixture
from test_metal import kernels_in
from test_tuning_devices import FAST, SLOW, TOO_LARGE, WRONG, norm
from test_tuning_devices import offer as offer
from treacherous_kernel import KNOB, check_ingest, emit_tiny, measure_alone, measured_ways
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from osscompile import cli
from osscompile.runtime.trials import measure
from osscompile.runtime.trials.files import read_plan
from osscompile.runtime.trials.machines import TrialMachine
from osscompile.targets import Target
from osscompile.tuning import tune
from osscompile.tuning.workloads import Workload, collect_workloads

BEYOND, FAULTY = 10, 11


def norm_with_faults(function: PrimFunc, way: int) -> PrimFunc:
    """Also offer a norm that writes beyond its result, and one whose threads miss a barrier."""
    if way not in (BEYOND, FAULTY):
        return norm(function, way)
    hidden = int(function.params[1].shape[0])
    end = hidden + (way == BEYOND)
    waiting = 2 if way == BEYOND else 1  # of two threads

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def by_two_threads(
        x: T.Buffer((1, hidden), "float32"),
        weight: T.Buffer((hidden,), "float32"),
        out: T.Buffer((1, hidden), "float32"),
    ) -> None:
        for _ in T.thread_binding(T.int64(1), thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(2), thread="threadIdx.x"):
                total = T.alloc_buffer((1,), "float32", scope="local")
                total[0] = T.float32(0)
                for i in range(T.int64(hidden)):
                    total[0] += x[0, i] * x[0, i]
                if thread < waiting:
                    T.evaluate(T.tvm_storage_sync("shared"))
                for i in range(T.int64(end)):
                    out[0, i] = (
                        x[0, i % hidden]
                        * weight[i % hidden]
                        / T.sqrt(total[0] * T.float32(1 / hidden) + T.float32(1e-5))
                    )

    return by_two_threads.with_attr("op", "rms_norm")


@pytest.fixture
def here(this_machine: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(test_tuning_devices, "norm", norm_with_faults)
    return on_this_machine(this_machine)


@pytest.fixture
def with_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the measuring process find the stand-in."""
    for name, value in stand_in().items():
        monkeypatch.setenv(name, value)


# --- Builds for a Mac -------------------------------------------------------------------------


@needs_gxx
def test_candidates_of_the_real_rules_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel of each kind is built into libraries for a Mac; nothing runs."""

    def one_of_each(*arguments: Any) -> list[Workload]:
        found = collect_workloads(*arguments)
        return list({str(workload.function.attrs["op"]): workload for workload in found}.values())

    monkeypatch.setattr(tune, "collect_workloads", one_of_each)
    tune.emit(tmp_path / "emitted", METAL, ["nano"], "fast", 1)
    kernels: dict[str, str] = {}
    for file in tmp_path.glob("emitted/*/plan.json"):
        plan = read_plan(file.parent)
        assert (plan.runtime, plan.device) == ("tvm", "metal")
        assert (plan.system, plan.architecture) == ("Darwin", "arm64")
        for candidate in plan.candidates:
            library = (file.parent / candidate.library).read_bytes()
            assert struct.unpack_from("<IIxxxxI", library) == (MACH_O_64, ARM64, DYLIB)
            assert candidate.programs is None
            for name, source in kernels_in(library).items():
                number = len(kernels)  # other kernels have the same names
                kernels[f"{name}_{number}"] = source.replace(f" {name}(", f" {name}_{number}(")
    result = check_compiles(kernels, tmp_path)
    assert len(kernels) >= 8 and result.returncode == 0, result.stderr


# --- Measuring on the stand-in ----------------------------------------------------------------


@needs_gxx
def test_emitted_is_measured_by_the_bundle_alone_and_ingested(
    offer: Callable[..., None],
    here: Target,
    for_here: None,
    with_stand_in: None,
    tmp_path: Path,
) -> None:
    """Candidates that are wrong, cannot be launched or end the device are told and never kept. If
    one ends the device, another process measures the others."""
    offer(SLOW, FAST, WRONG, TOO_LARGE, BEYOND, FAULTY)
    folder = emit_tiny(tmp_path / "emitted", here)
    far, told = measure_alone(folder, tmp_path / "far", "tvm", "tqdm", "pyopencl")
    for way, reason in (
        (WRONG, "wrong: off by"),
        (TOO_LARGE, "threads of kernel_kernel"),
        (BEYOND, "writes beyond the end"),
        (FAULTY, "ended the measuring: .*GPUError after kernel kernel_kernel: 1 of 2 threads wait"),
    ):
        line = rf"^rms_norm with {{'{KNOB}': {way}}}: .*{reason}"
        assert re.search(line, told, re.MULTILINE), told
    assert measured_ways(far) == {FAST}
    check_ingest(far, METAL, FAST, tmp_path / "records.json")


@needs_gxx
def test_tune_on_the_device_of_this_machine(
    offer: Callable[..., None],
    here: Target,
    for_here: None,
    with_stand_in: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a device it is not the default that fails, and builds are kept."""
    offer(SLOW, FAST)
    work = tmp_path / "work"
    options = ["--target", METAL.name, "--model", "synthetic:tiny", "--profile", "exact"]
    options += ["--work", str(work), "--output", str(tmp_path / "records.json")]
    with monkeypatch.context() as without:
        without.setenv("METAL_NO_DEVICE", "1")
        assert cli.main(["tune", *options]) == 1
        error = "cannot be measured here: metal: expected a device, found none on this machine"
        assert error in capsys.readouterr().err
        without.delenv("OSSCOMPILE_TVM_RUNTIME")
        assert cli.main(["tune", "--measure", str(work)]) == 1
        error = "cannot be measured here: metal: expected libtvm_runtime_metal"
        assert error in capsys.readouterr().err
    assert cli.main(["tune", "--measure", str(work), "--rpc", "127.0.0.1:1", "--key", "far"]) == 1
    assert "expected kernels of a CPU, found those of metal" in capsys.readouterr().err
    times = {file: file.stat().st_mtime_ns for file in work.glob(f"*/*{Path(here.library).suffix}")}
    assert len(times) == 2
    assert cli.main(["tune", *options]) == 0
    assert f"{KNOB}={FAST}" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


# --- The clock --------------------------------------------------------------------------------


class SlowToBegin(TrialMachine):
    """A machine that needs some time for a burst in addition to its calls."""

    def __init__(self, own: float, call: float) -> None:
        self.own, self.of_call, self.counts = own, call, list[int]()

    def seconds(self, kernel: Any, calls: Sequence[Sequence[Any]]) -> float:
        self.counts.append(len(calls))
        return self.own / len(calls) + self.of_call


@pytest.mark.parametrize("call", [2e-6, 2e-4, 0.05])
def test_what_a_burst_takes_beside_its_calls_is_spread(call: float) -> None:
    machine = SlowToBegin(5e-4, call)
    found = measure._time_in_turns({"default": None}, [[]], machine, lambda message: None)
    for seconds in found["default"]:
        assert call <= seconds < 1.05 * call
    assert machine.counts[-1] * call < 2 * max(call, measure.BURST_SECONDS)
