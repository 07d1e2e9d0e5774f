"""Every kernel, and nano, compiled for AArch64 Linux and run under emulation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import aarch64
import numpy as np
import pytest
import reference
import test_kernels_attention as attention
import test_kernels_matmul as matmul
import test_kernels_routing as routing
import test_kernels_rows as rows
from artifacts import TINY_OPTIONS
from checkpoints import config_json, hf_tensors
from kernel_cases import (
    DECODE,
    PREFILL,
    ROW_CASES,
    Case,
    Form,
    check_quantize,
    dense_q8,
    every_matmul,
    moe_mxfp4_swiglu_q8,
    numbers,
    rotate_queries,
)
from kernel_runner import Array
from random_model import read_checkpoint
from test_model_accuracy import EXACT, MAX_KL, NANO, NANO_QUESTIONS, nano_answer

import osscompile
from osscompile import targets
from osscompile.importer.graph import EXPERT_ROWS
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.targets import Target

pytestmark = pytest.mark.skipif(aarch64.why_absent() is not None, reason=str(aarch64.why_absent()))

Answers: TypeAlias = list[list[tuple[str, str]]]

VARIANTS = targets.load_variants("snapdragon")
(APPLE,) = targets.load_variants("apple-cpu")
# kernels that LLVM compiles for that CPU, in the file format of Linux
APPLE_KERNELS = dataclasses.replace(
    next(t for t in VARIANTS if t.int8_dot == APPLE.int8_dot),
    variant="apple",
    tvm=APPLE.tvm | {"mtriple": VARIANTS[0].tvm["mtriple"]},
)

on_variants = pytest.mark.parametrize("target", VARIANTS, ids=lambda t: t.variant)
both_forms = pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)

# --- Kernels ----------------------------------------------------------------------------------


@pytest.fixture
def here(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests of kernels, which are called as functions here, run them under emulation."""
    for module in (attention, matmul, routing, rows):
        monkeypatch.setattr(module, "HERE", target)


@pytest.mark.parametrize("target", [*VARIANTS, APPLE_KERNELS], ids=lambda t: t.variant)
@every_matmul
@both_forms
def test_matmul(target: Target, case: Callable[..., Case], form: Form) -> None:
    case(form).check(target)


@on_variants
@pytest.mark.parametrize("case", [dense_q8, moe_mxfp4_swiglu_q8], ids=lambda c: c.__name__)
def test_matmul_of_2880_inputs(target: Target, case: Callable[..., Case]) -> None:
    case(DECODE, 2880, 64).check(target)
    case(PREFILL, 2880, 64).check(target)


@on_variants
@pytest.mark.parametrize("case", [*ROW_CASES, rotate_queries], ids=lambda case: case.__name__)
@both_forms
def test_row_kernel(target: Target, case: Callable[[Form], Case], form: Form) -> None:
    case(form).check(target)


@on_variants
@both_forms
def test_quantize_q8(target: Target, form: Form) -> None:
    check_quantize(form, numbers(43, form.count, 96), target)


@on_variants
@pytest.mark.parametrize("block", rows.HARD_BLOCKS)
def test_quantize_q8_of_hard_blocks(target: Target, block: str) -> None:
    x = numbers(8, 21, 96)
    x[10, 32:64] = rows.HARD_BLOCKS[block]
    check_quantize(PREFILL, x, target)


@on_variants
@attention.every_window
@attention.both_dtypes
def test_attention(target: Target, window: int | None, dtype: str) -> None:
    attention.Layer(window, dtype, target=target).check_in_parts(20)


@on_variants
@pytest.mark.usefixtures("here")
class TestAgain:
    """Tests of kernels that other files define for this machine, run again."""

    @both_forms
    def test_int8_at_its_extremes(self, form: Form) -> None:
        matmul.test_int8_products_at_their_extremes_do_not_overflow(form)

    @pytest.mark.parametrize("code", [0x77, 0xFF])
    def test_mxfp4_at_its_extremes(self, code: int) -> None:
        for tokens, sign in itertools.product((4, EXPERT_ROWS), (1, -1)):
            matmul.test_mxfp4_products_at_their_extremes_do_not_overflow(tokens, code, sign)

    def test_swiglu_clamps(self) -> None:
        matmul.test_swiglu_clamps_beyond_7_and_survives_hugely_negative_gates("q8")

    @both_forms
    def test_route_ties(self, form: Form) -> None:
        routing.test_route_ties_go_to_the_lower_id(form)

    @both_forms
    @pytest.mark.parametrize("kind", ["q8", "digits"])
    def test_layer_of_experts(self, form: Form, kind: str) -> None:
        """Routing, sorting, gathering, quantising, products and the sum."""
        routing.test_moe_layer_of_all_its_kernels(form, kind)

    @both_forms
    def test_sort_by_expert(self, form: Form) -> None:
        routing.test_sort_by_expert_finds_every_choice_once(form, "one_expert_unused", 8, 4)

    def test_quantize_digits(self) -> None:
        rows.test_quantize_digits_holds_20_bits_of_a_blocks_largest(1.0)

    @both_forms
    @pytest.mark.parametrize("kind", ["q8", "digits"])
    def test_rms_norm_quantized(self, form: Form, kind: str) -> None:
        rows.test_rms_norm_quantized_is_the_norm_and_its_quantisation(form, kind)

    @both_forms
    @attention.both_dtypes
    def test_append_kv(self, form: Form, dtype: str) -> None:
        attention.test_append_kv_around_the_borders_of_pages(form, dtype, 63)


# --- Models -----------------------------------------------------------------------------------

QUESTIONS = ("What is 17 + 25?", "What is 61 - 48?")
ASK = """
import json, sys
import osscompile_runtime
path, variant, ids, *questions = sys.argv[1:]
model = osscompile_runtime.load(path, variant=variant or None, threads=2)
answers = []
for question in questions:
    message = {"role": "user", "content": question}
    pieces = model.chat([message], reasoning="low", current_date="2026-01-01")
    answers.append([(piece.channel, piece.text) for piece in pieces])
print(json.dumps([answers, model.logits(json.loads(ids)).tolist()]))
"""


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return osscompile.compile(
        "nano", VARIANTS[0].name, tmp_path_factory.mktemp("nano") / "nano.osc", context=4096
    )


def ask(
    artifact: Path, folder: Path, variant: str, ids: list[int], *questions: str
) -> tuple[Answers, Array]:
    """Return (answers, logits of those ids) of the bundled runtime under emulation."""
    bundle = aarch64.bundle_for_aarch64(folder)
    what = (artifact, variant, ids, *questions)
    arguments, environment = aarch64.command(bundle, "-c", ASK, *what)
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answers, logits = json.loads(result.stdout)
    return answers, np.array(logits)


@on_variants
def test_nano_says_what_it_says_here(
    nano: Path, nano_artifact: Path, tmp_path: Path, target: Target
) -> None:
    model = osscompile.load(nano_artifact)
    prompt, answer = nano_answer(model, *NANO_QUESTIONS[1])
    ids = prompt + answer
    answers, logits = ask(nano, tmp_path, target.variant, ids, *QUESTIONS)
    for question, said in zip(QUESTIONS, answers, strict=True):
        message = {"role": "user", "content": question}
        pieces = model.chat([message], reasoning="low", current_date="2026-01-01")
        assert [tuple(piece) for piece in said] == [(p.channel, p.text) for p in pieces]
    assert reference.relative_rms(logits, model.logits(ids)) < 4e-2  # as in test_variants.py
    # int8 costs the same as on this machine
    judge = reference.Model(*read_checkpoint(NANO))
    assert reference.kl_divergence(judge.logits(ids), logits) < MAX_KL


def test_cpu_that_runs_all_variants_takes_the_best(nano: Path, tmp_path: Path) -> None:
    bundle = aarch64.bundle_for_aarch64(tmp_path)
    code = "import sys; from osscompile_runtime.artifact import open_artifact, Path; "
    code += "print(open_artifact(Path(sys.argv[1])).variant.name)"
    arguments, environment = aarch64.command(bundle, "-c", code, nano)
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == VARIANTS[0].variant, result.stderr


def test_exact_tiny_is_the_reference(tmp_path: Path) -> None:
    options = TINY_OPTIONS | {"variants": [VARIANTS[0].variant]}
    with warnings.catch_warnings(action="ignore"):  # it has no tokenizer
        path = osscompile.compile(
            "synthetic:tiny", VARIANTS[0].name, tmp_path / "tiny.osc", **options
        )
    ids = np.random.default_rng(7).integers(0, TINY.vocab_size, 100).tolist()
    _, logits = ask(path, tmp_path, "", ids)
    judge = reference.Model(config_json(TINY), hf_tensors(SyntheticSource(TINY)))
    assert reference.relative_rms(logits, judge.logits(ids)) < EXACT
