"""The compiled models `tiny` and nano against the float64 reference: `exact` computes the same, and
`fast` stays near."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
from checkpoints import config_json, hf_tensors
from random_model import read_checkpoint
from reference import kl_divergence, relative_rms, top1_agreement

import osscompile
import osscompile.nano
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.runtime import Model, load
from osscompile.runtime.harmony import render_chat
from osscompile.targets import Target

NANO = Path(osscompile.nano.__file__).parent / "checkpoint"

EXACT = 1e-5  # relative rms to float64, as in test_model.py
MAX_KL = 6e-3  # nats; llama.cpp is 2.9e-3 to 5.8e-3 from float32 on such models


def check_fast(
    model: Model,
    judge: reference.Model,
    prompt: list[int],
    answer: list[int],
    record: Callable[[str, object], None],
) -> None:
    """Compare the logits that follow the prompt and each token of the answer.

    What nano would say in place of the prompt's own tokens it never learned: there, roundings to
    int8 can change an expert and with it everything.
    """
    expected = judge.logits(prompt + answer)[len(prompt) - 1 :]
    scored = model.logits(prompt + answer)[len(prompt) - 1 :]
    model._sequence.reuse(())
    decoded = np.stack([model.prefill(prompt), *(model.decode(token) for token in answer)])
    for name, logits in (("score", scored), ("decode", decoded)):
        kl, top1 = kl_divergence(expected, logits), top1_agreement(expected, logits)
        record(f"{name}_kl_divergence", kl)
        record(f"{name}_top1_agreement", top1)
        print(f"{name}: KL {kl:.2e} top-1 {top1:.1%}")
        assert kl < MAX_KL
        assert top1 > 0.9


def test_fast_is_close_to_float64_on_synthetic_weights(
    this_machine: Target, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        path = osscompile.compile(
            "synthetic:tiny",
            this_machine.name,
            tmp_path / "tiny.osc",
            variants=[this_machine.variant],
            context=256,
        )
    judge = reference.Model(config_json(TINY), hf_tensors(SyntheticSource(TINY)))
    ids = np.random.default_rng(7).integers(0, TINY.vocab_size, 200).tolist()
    check_fast(load(path), judge, ids[:1], ids[1:], record_property)


def test_tiny_artifact_is_exact(tiny_artifact: Path) -> None:
    """The model has head size 32, 8 queries per KV head, and synthetic weights."""
    judge = reference.Model(config_json(TINY), hf_tensors(SyntheticSource(TINY)))
    ids = np.random.default_rng(7).integers(0, TINY.vocab_size, 100).tolist()
    assert relative_rms(load(tiny_artifact).logits(ids), judge.logits(ids)) < EXACT


# --- nano -------------------------------------------------------------------------------------

NANO_QUESTIONS = (
    ("What is 17 + 25?", "low"),
    ("What is 17 + 25?", "high"),
    ("What is 423 - 158?", "medium"),
    ("Hello!", "medium"),
)


def nano_answer(model: Model, question: str, reasoning: str) -> tuple[list[int], list[int]]:
    """Return (prompt ids, ids of the greedy answer)."""
    assert model.tokenizer is not None
    messages = [{"role": "user", "content": question}]
    prompt = render_chat(messages, model.tokenizer, reasoning=reasoning, current_date="2026-01-01")
    return prompt, [token.token_id for token in model.generate(prompt, max_tokens=128)]


def test_nano_exact_says_what_the_reference_says(this_machine: Target, tmp_path: Path) -> None:
    """Both are greedy; a token may only differ where float32 cannot tell the best two apart."""
    path = osscompile.compile(
        "nano",
        this_machine.name,
        tmp_path / "nano.osc",
        variants=[this_machine.variant],
        profile="exact",
        context=512,
    )
    model, judge = load(path), reference.Model(*read_checkpoint(NANO))
    for question, reasoning in NANO_QUESTIONS:
        prompt, answer = nano_answer(model, question, reasoning)
        expected = judge.logits(prompt + answer)
        assert relative_rms(model.logits(prompt + answer), expected) < EXACT
        rows = expected[len(prompt) - 1 : -1]
        behind = rows.max(axis=1) - rows[np.arange(len(answer)), answer]
        assert len(answer) > 3
        assert behind.max() < 1e-4, (question, answer[behind.argmax()])


def test_nano_fast_is_close_to_float64(
    nano_artifact: Path, record_property: Callable[[str, object], None]
) -> None:
    model, judge = load(nano_artifact), reference.Model(*read_checkpoint(NANO))
    prompt, answer = nano_answer(model, *NANO_QUESTIONS[1])
    check_fast(model, judge, prompt, answer, record_property)
