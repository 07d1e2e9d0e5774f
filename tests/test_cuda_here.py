"""Artifacts for h100 on this machine: g++ compiles their kernels, and a stand-in for NVIDIA's
driver launches them (see `cuda_device.py`). They compute what is right; bench and tune go through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_device
import pytest
import reference
from cuda_device import H100, compile_here
from device_choices import (
    check_logits_stay,
    check_rows_of_all_kinds,
    options_together,
)
from device_models import check_exact, check_nano
from metal_device import needs_gxx
from random_model import read_checkpoint
from reference import relative_rms
from talker import compile_talker
from test_model_accuracy import EXACT, NANO, NANO_QUESTIONS, nano_answer
from test_tuning_devices import FAST, SLOW, WRONG
from test_tuning_devices import offer as offer  # a fixture
from treacherous_kernel import check_ingest, emit_tiny, measured_ways

import osscompile
from osscompile.runtime import load
from osscompile.runtime.bench import bandwidth_device
from osscompile.runtime.bench.models import bench
from osscompile.runtime.devices import cuda_driver
from osscompile.runtime.trials.measure import measure_kernel

pytestmark = needs_gxx


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[None]:
    """Replace the driver and CUDA's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("osscompile.codegen.cuda.compile_cuda", compile_here)
        patch.setattr(cuda_driver, "DRIVER", str(cuda_device.driver()))
        yield


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cuda") / "nano.osc"
    return osscompile.compile("nano", H100.name, output, context=1024)


def test_nano_is_close_to_float64_and_says_what_a_cpu_says(
    nano: Path, nano_artifact: Path, record_property: Any
) -> None:
    check_nano(nano, nano_artifact, record_property)


@pytest.mark.long  # every day `test_exact_is_the_reference` judges the same kernels
def test_nano_exact_says_what_the_reference_says(tmp_path: Path) -> None:
    options: dict[str, Any] = {"profile": "exact", "context": 512}
    model = load(osscompile.compile("nano", H100.name, tmp_path / "nano.osc", **options))
    prompt, answer = nano_answer(model, *NANO_QUESTIONS[0])
    judge = reference.Model(*read_checkpoint(NANO))
    expected = judge.logits(prompt + answer)
    assert relative_rms(model.logits(prompt + answer), expected) < EXACT
    assert len(answer) > 3 and answer == expected[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_exact_is_the_reference(tmp_path: Path) -> None:
    check_exact(compile_talker(H100.name, tmp_path, None))


@options_together
def test_logits_stay_on_the_device(nano: Path, option: dict[str, Any]) -> None:
    check_logits_stay(nano, option)


def test_rows_of_all_kinds(nano: Path) -> None:
    check_rows_of_all_kinds(nano)


def test_bench(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel in C++, in place of the one in PTX, measures the bandwidth."""
    monkeypatch.setattr(bandwidth_device, "READ_BYTES", 1 << 22)
    monkeypatch.setattr("osscompile.runtime.bench.models.DECODE_STEPS", 3)
    report = bench(nano, (16,), (0, 100))
    assert report.device == "Stand-in (CUDA driver 12.4)"
    assert list(report.prefill) == [16] and list(report.decode) == [0, 100]
    assert report.bandwidth > 0 and report.first_token_seconds


def test_tune_finds_the_faster_schedule(
    offer: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(SLOW, FAST, WRONG)
    # for the measuring processes
    monkeypatch.setenv("LD_LIBRARY_PATH", str(cuda_device.driver().parent))
    folder, told = emit_tiny(tmp_path / "emitted", H100), list[str]()
    measure_kernel(folder, report=told.append)
    assert measured_ways(folder) == {FAST}
    assert any("wrong: off by" in line for line in told)
    check_ingest(folder, H100, FAST, tmp_path / "records.json")
