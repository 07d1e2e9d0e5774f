"""Checks of whole models, with random weights and nano, that every device must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
from random_model import read_checkpoint
from reference import relative_rms
from talker import random_ids
from test_model_accuracy import EXACT, NANO, NANO_QUESTIONS, check_fast, nano_answer

from osscompile.runtime import load

# Experts and profile: the two models differ in the number of experts only, so that two of the four
# pairs are enough for every day.
OF_GPT_OSS = pytest.mark.parametrize(
    ("num_experts", "profile"),
    [
        pytest.param(32, "fast", id="20b-fast"),
        pytest.param(128, "exact", id="120b-exact"),
        pytest.param(32, "exact", id="20b-exact", marks=pytest.mark.long),
        pytest.param(128, "fast", id="120b-fast", marks=pytest.mark.long),
    ],
)


def check_exact(talker: Path) -> None:
    """Score, prefill and decode with random weights, past the window and over pages."""
    model = load(talker)
    ids = random_ids(150, seed=3)
    expected = reference.Model(*read_checkpoint(talker.parent / "checkpoint")).logits(ids)
    assert relative_rms(model.logits(ids), expected) < EXACT
    assert relative_rms(model.prefill(ids[:149]), expected[148]) < EXACT
    assert relative_rms(model.decode(ids[149]), expected[149]) < EXACT


def check_nano(nano: Path, on_cpu: Path, record: Any) -> None:
    """nano says the same as on a CPU, and is close to float64."""
    model = load(nano)
    prompt, answer = nano_answer(model, *NANO_QUESTIONS[0])
    assert len(answer) > 3
    assert (prompt, answer) == nano_answer(load(on_cpu), *NANO_QUESTIONS[0])
    check_fast(model, reference.Model(*read_checkpoint(NANO)), prompt, answer, record)
