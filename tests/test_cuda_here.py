"""Artifacts for h100 on this machine, their kernels compiled by g++ and launched by a stand-in for
NVIDIA's driver (see `cuda_device.py`): what they compute, and that bench and tune go through."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_device
import numpy as np
import pytest
import reference
from cuda_device import H100, compile_here
from metal_device import needs_gxx
from random_model import random_model, read_checkpoint, write_checkpoint
from reference import relative_rms
from talker import random_ids
from test_model_accuracy import EXACT, NANO, NANO_QUESTIONS, check_fast, nano_answer
from test_tuning_devices import FAST, SLOW, WRONG
from test_tuning_devices import offer as offer  # a fixture
from treacherous_kernel import emit_tiny, way_of

import osscompile
from osscompile import bench_bandwidth_device, build_cuda, cli
from osscompile.bench import bench
from osscompile.runtime import cuda, load
from osscompile.runtime.measure import measure_kernel
from osscompile.runtime.trials import read_plan, read_trials

pytestmark = needs_gxx


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[None]:
    """Of the driver, and of CUDA's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_cuda, "compile_cuda", compile_here)
        patch.setattr(cuda, "DRIVER", str(cuda_device.driver()))
        yield


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cuda") / "nano.osc"
    return osscompile.compile("nano", H100.name, output, context=1024)


def test_nano_is_close_to_float64_and_says_what_a_cpu_says(
    nano: Path, nano_artifact: Path, record_property: Any
) -> None:
    model, on_cpu = load(nano), load(nano_artifact)
    prompt, answer = nano_answer(model, *NANO_QUESTIONS[0])
    assert len(answer) > 3 and (prompt, answer) == nano_answer(on_cpu, *NANO_QUESTIONS[0])
    judge, ids = reference.Model(*read_checkpoint(NANO)), (prompt + answer)[:48]
    check_fast(model, judge, ids, record_property)


def test_nano_exact_says_what_the_reference_says(tmp_path: Path) -> None:
    options: dict[str, Any] = {"profile": "exact", "context": 512}
    model = load(osscompile.compile("nano", H100.name, tmp_path / "nano.osc", **options))
    prompt, answer = nano_answer(model, *NANO_QUESTIONS[0])
    expected = reference.Model(*read_checkpoint(NANO)).logits(prompt + answer)
    assert relative_rms(model.logits(prompt + answer), expected) < EXACT
    assert len(answer) > 3 and answer == expected[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_exact_is_the_reference(tmp_path: Path) -> None:
    """Score, prefill and decode of random weights, past the window and around the rings."""
    config, tensors = random_model(0, window=16)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, tensors)
    options: dict[str, Any] = {"profile": "exact", "context": 256, "prefill_chunk": 32}
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        path = osscompile.compile(checkpoint, H100.name, tmp_path / "model.osc", **options)
    model = load(path)
    ids = [i % model.vocab_size for i in random_ids(150, seed=3)]
    expected = reference.Model(config, tensors).logits(ids)
    assert relative_rms(model.logits(ids), expected) < EXACT
    assert relative_rms(model.prefill(ids[:149]), expected[148]) < EXACT
    assert relative_rms(model.decode(ids[149]), expected[149]) < EXACT


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_chosen_on_the_device(
    nano: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    model = load(nano)
    device, shapes = model._device, []
    numpy = device.numpy
    monkeypatch.setattr(device, "numpy", lambda a: shapes.append(a.shape) or numpy(a))
    options: dict[str, Any] = {"max_tokens": 4, "temperature": temperature, "seed": 5}
    first = [token.token_id for token in model.generate(range(20), **options)]
    assert shapes == [(1, 2)] * len(first)
    assert [token.token_id for token in model.generate(range(20), **options)] == first
    if temperature == 0:
        assert first[0] == np.argmax(load(nano).prefill(range(20)))


def test_bench(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth is that of a kernel in C++ in place of the one in PTX."""
    monkeypatch.setattr(bench_bandwidth_device, "READ_BYTES", 1 << 22)
    monkeypatch.setattr("osscompile.bench.DECODE_STEPS", 3)
    report = bench(nano, (16,), (0, 100))
    assert report.device == "Stand-in (CUDA driver 12.4)"
    assert list(report.prefill) == [16] and list(report.decode) == [0, 100]
    assert report.bandwidth > 0 and report.first_token_seconds


def test_tune_finds_the_faster_schedule(
    offer: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(SLOW, FAST, WRONG)
    # of the processes that measure
    monkeypatch.setenv("LD_LIBRARY_PATH", str(cuda_device.driver().parent))
    folder, told = emit_tiny(tmp_path / "emitted", H100), list[str]()
    measure_kernel(folder, report=told.append)
    plan = read_plan(folder)
    assert {way_of(plan, library) for library in read_trials(folder, plan)} == {FAST}
    assert any("wrong: off by" in line for line in told)
    options = ["--target", H100.name, "--output", str(tmp_path / "records.json")]
    assert cli.main(["tune", *options, "--ingest", str(tmp_path / "emitted")]) == 0
    assert len(json.loads((tmp_path / "records.json").read_text())[plan.key]) == 1
