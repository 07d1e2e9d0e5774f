"""Tuning on devices whose kernels the runtime launches: OpenCL's, and CUDA's, where a stand-in for
the driver does what it is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_device
import numpy as np
import pytest
from opencl_device import OPENCL, needs_opencl
from test_cuda import H100, needs_nvcc
from test_cuda import image as image  # a fixture
from treacherous_kernel import KNOB, check_ingest, emit_tiny, measure_alone, measured_ways
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from osscompile import cli
from osscompile.runtime.devices.program import Launch, Launches
from osscompile.runtime.errors import TuningError
from osscompile.runtime.trials.files import (
    CHECKED,
    TIMED,
    Answer,
    Argument,
    Candidate,
    Plan,
    read_answer,
    read_plan,
    read_trials,
    sha256_of,
    write_answer,
    write_plan,
)
from osscompile.runtime.trials.inputs import make_array
from osscompile.runtime.trials.measure import measure_kernel
from osscompile.schedules import rule as schedule_rule
from osscompile.schedules.gpu import GPU_RULES
from osscompile.schedules.records import Choose
from osscompile.targets import Target
from osscompile.tuning import emit, tune

SLOW, FAST, WRONG, TOO_LARGE = range(4)
TOO_MANY_THREADS = 1 << 15


def norm(function: PrimFunc, way: int) -> PrimFunc:
    """Return the RMSNorm of one token on one thread, which adds up its sum `times` times."""
    hidden = int(function.params[1].shape[0])
    times = 300 if way == SLOW else 1
    share = 1 / (hidden * times)
    epsilon = 0.5 if way == WRONG else 1e-5
    threads = TOO_MANY_THREADS if way == TOO_LARGE else 1

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def by_one_thread(
        x: T.Buffer((1, hidden), "float32"),
        weight: T.Buffer((hidden,), "float32"),
        out: T.Buffer((1, hidden), "float32"),
    ) -> None:
        for _ in T.thread_binding(T.int64(1), thread="blockIdx.x"):
            for _ in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                total = T.alloc_buffer((1,), "float32", scope="local")
                total[0] = T.float32(0)
                for i in range(T.int64(hidden * times)):
                    total[0] += x[0, i % hidden] * x[0, i % hidden]
                for i in range(T.int64(hidden)):
                    out[0, i] = (
                        x[0, i]
                        * weight[i]
                        / T.sqrt(total[0] * T.float32(share) + T.float32(epsilon))
                    )

    return by_one_thread.with_attr("op", "rms_norm")


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the norm of one token the only kernel that has something to tune."""

    def set_ways(*ways: int) -> None:
        def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
            op, rows = str(function.attrs["op"]), function.params[0].shape[0]
            if op == "rms_norm" and getattr(rows, "value", None) == 1:
                return Schedule(norm(function, choose(KNOB, ways, SLOW)))

            def default(name: str, candidates: Any, default: int) -> int:
                return default

            found = (other(function, target, default) for other in GPU_RULES)
            return next(schedule for schedule in found if schedule is not None)

        monkeypatch.setattr(schedule_rule, "RULES", {"gpu": (rule,)})

    return set_ways


# --- OpenCL -----------------------------------------------------------------------------------


@needs_opencl
def test_emitted_is_measured_by_the_bundle_alone_and_ingested(
    offer: Callable[..., None], tmp_path: Path
) -> None:
    """Candidates that are wrong or cannot be launched are told, and never kept."""
    offer(SLOW, FAST, WRONG, TOO_LARGE)
    folder = emit_tiny(tmp_path / "emitted", OPENCL)
    far, told = measure_alone(folder, tmp_path / "far", "tvm", "tvm_ffi", "tqdm")
    assert f"{{'{KNOB}': {WRONG}}}: wrong: off by" in told
    assert f"{{'{KNOB}': {TOO_LARGE}}}: " in told and "can run, found" in told
    assert measured_ways(far) == {FAST}
    check_ingest(far, OPENCL, FAST, tmp_path / "records.json")


@needs_opencl
def test_tune_on_the_device_of_this_machine(
    offer: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured or built a second time."""
    offer(SLOW, FAST)
    options = ["--target", OPENCL.name, "--model", "synthetic:tiny", "--profile", "exact"]
    options += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "records.json")]
    assert cli.main(["tune", *options]) == 0
    assert f"{KNOB}={FAST}" in capsys.readouterr().out
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("work/*/*.[ac]*")}
    trials = next(tmp_path.glob("work/*/results.json")).read_text()
    assert cli.main(["tune", *options]) == 0
    assert len(times) == 3 and all(f.stat().st_mtime_ns == times[f] for f in times)
    assert next(tmp_path.glob("work/*/results.json")).read_text() == trials


def test_every_candidate_of_nano_has_its_launches(tmp_path: Path) -> None:
    """The candidates are those of the real rules; nothing runs."""
    assert tune.emit(tmp_path, OPENCL, ["nano"], "fast", 1) >= 8
    for file in tmp_path.glob("*/plan.json"):
        plan = read_plan(file.parent)
        assert len(plan.candidates) == 2
        for candidate in plan.candidates:
            source = (file.parent / candidate.library).read_text()
            for call in (CHECKED, TIMED):
                assert candidate.programs is not None
                for launch in candidate.programs[call].launches:
                    assert f" {launch.kernel}(" in source
        assert all(np.isfinite(array).all() for array in read_answer(file.parent, plan))


# --- CUDA -------------------------------------------------------------------------------------


@needs_nvcc
def test_candidates_are_compiled_for_sm_90a(offer: Callable[..., None], tmp_path: Path) -> None:
    offer(SLOW, FAST)
    folder = emit_tiny(tmp_path / "emitted", H100)
    plan = read_plan(folder)
    assert plan.runtime == "cuda" and len(plan.candidates) == 2
    for candidate in plan.candidates:
        assert (folder / candidate.library).read_bytes()[:4] == b"\x50\xed\x55\xba"  # a fat binary


SIZE = 1000
KERNELS = ("slow", "quick", "wrong", "beyond", "faulty", "missing")  # constants are numbers


@pytest.fixture
def planned(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose candidates are kernels of the stand-in, loaded by the measuring process."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(cuda_device.driver().parent))
    folder = tmp_path / "doubled"
    folder.mkdir()
    shape = (1, SIZE)
    x = Argument("x", "float32", shape, shape, "normal")
    out = Argument("out", "float32", shape, shape, "output", written=True)
    write_answer(folder / "doubled.answer", [2 * make_array(x, shape)])

    def candidate(kernel: str, threads: int = 10) -> Candidate:
        file = folder / f"{kernel}-{threads}.fatbin"
        shutil.copyfile(image, file)
        arguments = (("bound", 1), ("bound", 0), ("int64", SIZE))
        launches = Launches((), (Launch(kernel, arguments, (SIZE // 10,), (threads,)),))
        constants = {"kernel": KERNELS.index(kernel), "threads": threads}
        return Candidate(
            file.name, sha256_of(file) or "", constants, {CHECKED: launches, TIMED: launches}
        )

    plan = Plan(
        target=H100.name,
        variant=H100.variant,
        runtime="cuda",
        device="",
        system="any",
        architecture="any",
        cpu_features=(),
        key="double float32[1,1000]",
        arguments=(x, out),
        answer=Answer("doubled.answer", sha256_of(folder / "doubled.answer") or ""),
        candidates=(
            candidate("slow"),
            candidate("quick"),
            candidate("wrong"),
            candidate("beyond"),
            candidate("quick", 2048),
            candidate("faulty"),
            candidate("missing"),
        ),
    )
    write_plan(folder, plan)
    return folder


def test_device_that_a_candidate_spoils_serves_the_others(planned: Path) -> None:
    """Each kernel that fails is told with its reason; the one that ends the device ends only its
    own process."""
    told: list[str] = []
    measure_kernel(planned, report=told.append)
    trials = read_trials(planned, read_plan(planned))
    assert list(trials) == ["quick-10.fatbin"]
    assert trials["quick-10.fatbin"].ratio < 0.9
    for kernel, threads, reason in (
        ("wrong", 10, "wrong: off by"),
        ("beyond", 10, "writes beyond the end"),
        ("quick", 2048, "too many resources"),
        ("faulty", 10, "ended the measuring: .*illegal address"),
        ("missing", 10, "missing: .*not found"),
    ):
        line = re.escape(
            f"double with {{'kernel': {KERNELS.index(kernel)}, 'threads': {threads}}}: "
        )
        assert re.search(f"^{line}.*{reason}", "\n".join(told), re.MULTILINE), told


def test_machine_without_the_device(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error does not blame the default."""
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(TuningError, match=r"cannot be measured here: .*install NVIDIA's driver"):
        measure_kernel(planned)


# --- Damaged plans ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(runtime="abacus"),
        lambda plan: plan.update(runtime="tvm"),
        lambda plan: plan.update(device="metal"),
        lambda plan: plan["candidates"][0].update(programs=None),
        lambda plan: plan["candidates"][0].update(programs=[]),
        lambda plan: plan["candidates"][0]["programs"].pop(TIMED),
        lambda plan: launch(plan).update(kernel="a b"),
        lambda plan: launch(plan).update(groups=[-1]),
        lambda plan: launch(plan).update(threads=["tokens"]),
        lambda plan: launch(plan)["arguments"].append(["bound", 2]),
        lambda plan: launch(plan)["arguments"].append(["input", 0]),
        lambda plan: launch(plan)["arguments"].append(["storage", 0]),
        lambda plan: plan["candidates"][0]["programs"][TIMED].update(storages=[1 << 60]),
        lambda plan: plan["answer"].update(file="../x.answer"),
        lambda plan: plan.update(answer=None),
    ],
)
def test_damaged_plan(planned: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plan = json.loads((planned / "plan.json").read_text())
    change(plan)
    (planned / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(TuningError, match=r"plan.json: expected .*, found"):
        measure_kernel(planned)


def launch(plan: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plan["candidates"][0]["programs"][TIMED]["launches"][0]
    return found


def test_answer_that_was_changed(planned: Path) -> None:
    content = bytearray((planned / "doubled.answer").read_bytes())
    content[7] ^= 1
    (planned / "doubled.answer").write_bytes(content)
    with pytest.raises(TuningError, match=r"doubled.answer: expected sha256"):
        measure_kernel(planned)


def test_answer_of_another_size(planned: Path) -> None:
    write_answer(planned / "doubled.answer", [np.zeros(7, np.int8)])
    with pytest.raises(TuningError, match=r"doubled.answer: expected 4000 bytes, found 7"):
        read_answer(planned, read_plan(planned))
    (planned / "doubled.answer").write_bytes(bytes(7))
    with pytest.raises(TuningError, match=r"doubled.answer: expected what zlib compressed"):
        read_answer(planned, read_plan(planned))


# --- The answer -------------------------------------------------------------------------------


def test_answer_is_computed_once(
    offer: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(SLOW, FAST)
    folder = emit_tiny(tmp_path, OPENCL)
    (answer,) = read_answer(folder, read_plan(folder))
    x, weight, _ = (make_array(a, a.check_shape) for a in read_plan(folder).arguments)
    expected = x * weight / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-5)
    np.testing.assert_allclose(answer, expected, rtol=1e-5)
    monkeypatch.setattr(emit, "compute_answer", lambda _: pytest.fail("computed again"))
    emit_tiny(tmp_path, OPENCL)
