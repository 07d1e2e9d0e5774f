"""Whole compiled models against the float64 reference: logits on random weights, and on nano."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from random_model import random_model, read_checkpoint, write_checkpoint
from reference import Ablation, kl_divergence, relative_rms, top1_agreement

import osscompile.nano
from osscompile.compile import compile as compile_model
from osscompile.runtime import Model, load
from osscompile.runtime.harmony import render_chat

EXACT = 1e-5  # relative rms to float64; float32 arithmetic measures 4e-7 to 2e-6
SAME = 1e-5  # relative rms between two ways to compute the same in float32
NOTICED = 1e-2  # relative rms by which every mistake that the tests must notice is away
SAFE_MARGIN = 1e-5  # router logits closer than this may be ordered otherwise by rounding
WINDOW, CHUNK = 16, 32  # of the model `small`: its rings hold 48 positions
NANO = Path(osscompile.nano.__file__).parent / "checkpoint"

F64 = NDArray[np.float64]
Tensors = dict[str, NDArray[Any]]
Change = Callable[[Tensors], None]


@dataclass(frozen=True)
class Compiled:
    path: Path
    model: Model
    config: dict[str, Any]
    tensors: Tensors

    def reference(self, ids: list[int], ablation: Ablation | None = None) -> F64:
        """Logits [n, vocab]. Without an ablation, makes sure that rounding cannot reroute a token,
        so that a difference is a mistake."""
        trace: dict[str, NDArray[Any]] = {}
        logits = reference.Model(self.config, self.tensors, ablation).logits(ids, trace=trace)
        if ablation is None:
            assert min(router_margins(trace, self.config), default=1.0) > SAFE_MARGIN
        return logits

    def random_ids(self, count: int) -> list[int]:
        rng = np.random.default_rng(7)
        return [int(i) for i in rng.integers(0, self.model.vocab_size, count)]


def router_margins(trace: dict[str, NDArray[Any]], config: dict[str, Any]) -> Iterable[float]:
    """Per layer: the smallest distance of an expert that was chosen from one that was not."""
    k, num_experts = config["num_experts_per_tok"], config["num_local_experts"]
    for name, logits in trace.items():
        if name.endswith("router_logits") and k < num_experts:
            falling = -np.sort(-logits, axis=1)
            yield float((falling[:, k - 1] - falling[:, k]).min())


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """Compile a random model; `change` edits its tensors, other options are its shape."""

    def build(
        seed: int = 0,
        *,
        profile: str = "exact",
        context: int = 256,
        chunk: int = CHUNK,
        change: Change | None = None,
        **shape: int,
    ) -> Compiled:
        config, tensors = random_model(seed, **shape)
        if change is not None:
            change(tensors)
        folder = tmp_path_factory.mktemp("random")
        write_checkpoint(folder / "checkpoint", config, tensors)
        with pytest.warns(UserWarning, match="no tokenizer.json"):
            path = compile_model(
                folder / "checkpoint",
                output=folder / "model.osc",
                profile=profile,
                context=context,
                prefill_chunk=chunk,
            )
        return Compiled(path, load(path), config, tensors)

    return build


@pytest.fixture(scope="module")
def small(build: Callable[..., Compiled]) -> Compiled:
    """Four layers, window 16, 4 queries per KV head."""
    return build(0, window=WINDOW)


@pytest.fixture(scope="module")
def long(build: Callable[..., Compiled]) -> Compiled:
    """The window of gpt-oss, and a context beyond the one before YaRN."""
    return build(1, layers=2, heads=2, kv_heads=1, window=128, context=4400, chunk=512)


def check_exact(compiled: Compiled, ids: list[int], record: Callable[[str, object], None]) -> None:
    """`score`, `prefill` and `decode` against the reference, as a whole and in the last row alone:
    among many rows an error at the edge of a window would hide."""
    expected = compiled.reference(ids)
    scored = compiled.model.logits(ids)
    prefilled = compiled.model._prefill(ids)
    errors = {
        "all": relative_rms(scored, expected),
        "last": relative_rms(scored[-1], expected[-1]),
        "prefill": relative_rms(prefilled, expected[-1]),
    }
    if len(ids) > 1:
        compiled.model._prefill(ids[:-1])
        errors["decode"] = relative_rms(compiled.model._decode(ids[-1]), expected[-1])
    for name, error in errors.items():
        record(f"relative_rms_{name}", error)
    print(f"{len(ids)} tokens:", " ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    assert max(errors.values()) < EXACT, errors


# --- exact: positions and windows -------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 130])
def test_exact_around_a_window_of_128(
    long: Compiled, count: int, record_property: Callable[[str, object], None]
) -> None:
    check_exact(long, long.random_ids(count), record_property)


@pytest.mark.parametrize("count", [WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 200])
def test_exact_around_a_small_window(
    small: Compiled, count: int, record_property: Callable[[str, object], None]
) -> None:
    check_exact(small, small.random_ids(count), record_property)


def test_exact_past_the_original_context(
    long: Compiled, record_property: Callable[[str, object], None]
) -> None:
    check_exact(long, long.random_ids(4300), record_property)


MISTAKES = {f.name: Ablation(**{f.name: True}) for f in fields(Ablation) if f.type == "bool"} | {
    "window too small": Ablation(window_offset=-1),
    "window too large": Ablation(window_offset=1),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_exact_is_far_from_every_mistake(small: Compiled, mistake: str) -> None:
    """What the other tests would see if the compiler forgot a part of the model."""
    ids = small.random_ids(75)
    wrong = small.reference(ids, MISTAKES[mistake])
    assert relative_rms(small.model.logits(ids), wrong) > NOTICED
    assert relative_rms(small.model._prefill(ids), wrong[-1]) > NOTICED


# --- exact: the ways to the same logits -------------------------------------------------------


@pytest.fixture(scope="module")
def at_once(small: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The weights of `small`, compiled to prefill any prompt of its context in one call."""
    folder = tmp_path_factory.mktemp("at_once")
    checkpoint = write_checkpoint(folder / "checkpoint", small.config, small.tensors)
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        path = compile_model(
            checkpoint, output=folder / "m.osc", profile="exact", context=256, prefill_chunk=256
        )
    return load(path)


@pytest.mark.parametrize(
    "count", [1, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, WINDOW + CHUNK + 1, 2 * CHUNK + 3, 250]
)
def test_prefill_at_once_in_chunks_and_token_by_token(
    small: Compiled, at_once: Model, count: int
) -> None:
    ids = small.random_ids(count)
    expected = at_once._prefill(ids)
    small.model._cache.reuse(())
    assert relative_rms(small.model._prefill(ids), expected) < SAME
    small.model._cache.reuse(())
    for token in ids:
        stepped = small.model._decode(token)
    assert relative_rms(stepped, expected) < SAME
    assert relative_rms(small.model.logits(ids)[-1], expected) < SAME


def test_last_position_of_the_context(small: Compiled) -> None:
    ids = small.random_ids(256)
    expected = small.reference(ids)[-1]
    assert relative_rms(small.model._prefill(ids), expected) < EXACT
    small.model._prefill(ids[:-1])
    assert relative_rms(small.model._decode(ids[-1]), expected) < EXACT


def test_number_of_threads_changes_nothing(small: Compiled, tmp_path: Path) -> None:
    """In processes of their own: TVM has one pool of threads per process."""
    script = (
        "import sys, numpy as np\n"
        "from osscompile.runtime import load\n"
        "path, threads, out, *ids = sys.argv[1:]\n"
        "model = load(path, threads=int(threads))\n"
        "ids = [int(i) for i in ids]\n"
        "np.save(out, np.stack([*model.logits(ids), model._prefill(ids), model._decode(0)]))\n"
    )
    ids = [str(i) for i in small.random_ids(100)]
    results = []
    for threads in ("1", "2", "3"):
        out = tmp_path / f"{threads}.npy"
        command = [sys.executable, "-c", script, str(small.path), threads, str(out), *ids]
        subprocess.run(command, check=True, cwd=tmp_path)
        results.append(np.load(out))
    assert relative_rms(results[1], results[0]) < 1e-6
    assert relative_rms(results[2], results[0]) < 1e-6


# --- exact: shapes ----------------------------------------------------------------------------

SHAPES = {
    "8 queries per KV head, odd vocabulary": {
        "heads": 8, "kv_heads": 1, "vocab": 323, "experts": 5, "window": 24,
    },
    "1 query per KV head, top 1": {
        "heads": 3, "kv_heads": 3, "vocab": 101, "experts": 3, "experts_per_token": 1, "hidden": 96,
    },
    "2 queries per KV head, all experts, window 1": {
        "heads": 4, "kv_heads": 2, "experts": 4, "experts_per_token": 4, "window": 1, "hidden": 32,
        "intermediate": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_on_other_shapes(
    build: Callable[..., Compiled], shape: str, record_property: Callable[[str, object], None]
) -> None:
    compiled = build(0, layers=2, **SHAPES[shape])
    check_exact(compiled, compiled.random_ids(75), record_property)


ALWAYS, NEVER = (1, 2, 5, 7), 3  # experts of layer 0, expert of layer 1


def go_to_extremes(tensors: Tensors) -> None:
    """Routing that is decided by the bias, gates and ups far outside the clamp, sinks that take
    everything or nothing."""

    def set_rows(name: str, rows: Any, value: float) -> None:
        tensors[f"model.layers.{name}"][rows] = ml_dtypes.bfloat16(value)

    set_rows("0.mlp.router.bias", list(ALWAYS), 50.0)
    set_rows("1.mlp.router.bias", NEVER, -50.0)
    bias = "1.mlp.experts.gate_up_proj_bias"
    for row, value in enumerate((30.0, 30.0, -30.0, -30.0, -300.0, 300.0, 300.0, -300.0)):
        set_rows(bias, (slice(None), row), value)  # even: gates, odd: ups
    set_rows("0.self_attn.sinks", 0, 60.0)
    set_rows("0.self_attn.sinks", 1, -60.0)


@pytest.fixture(scope="module")
def extreme(build: Callable[..., Compiled]) -> Compiled:
    return build(1, layers=2, change=go_to_extremes)


@pytest.mark.parametrize("count", [1, 9, 100])
def test_experts_that_all_or_no_tokens_choose(
    extreme: Compiled, count: int, record_property: Callable[[str, object], None]
) -> None:
    ids = extreme.random_ids(count)
    trace: dict[str, NDArray[Any]] = {}
    reference.Model(extreme.config, extreme.tensors).logits(ids, trace=trace)
    assert (np.sort(trace["layers.0.expert_ids"], axis=1) == ALWAYS).all()
    assert NEVER not in trace["layers.1.expert_ids"]
    check_exact(extreme, ids, record_property)


def test_gates_and_ups_far_beyond_the_clamp(extreme: Compiled) -> None:
    ids = extreme.random_ids(75)
    logits = extreme.model.logits(ids)
    assert relative_rms(logits, extreme.reference(ids)) < EXACT
    assert relative_rms(logits, extreme.reference(ids, Ablation(no_clamp=True))) > 0.5


# --- fast -------------------------------------------------------------------------------------

MAX_KL = 6e-3  # nats; llama.cpp is 3e-3 to 6e-3 from float32 on models like these


def measure_fast(
    compiled: Compiled, ids: list[int], record: Callable[[str, object], None]
) -> tuple[float, float]:
    """(KL divergence, top-1 agreement) with the reference, of prefill and of decode."""
    expected = reference.Model(compiled.config, compiled.tensors).logits(ids)
    compiled.model._cache.reuse(())
    decoded = np.stack([compiled.model._decode(token) for token in ids])
    scored = compiled.model.logits(ids)
    kl = max(kl_divergence(expected, scored), kl_divergence(expected, decoded))
    top1 = min(top1_agreement(expected, scored), top1_agreement(expected, decoded))
    record("kl_divergence", kl)
    record("top1_agreement", top1)
    print(f"KL {kl:.2e} top-1 {top1:.1%}")
    return kl, top1


@pytest.mark.parametrize("hidden", [64, 256, 512])
def test_fast_is_close_to_float64(
    build: Callable[..., Compiled], hidden: int, record_property: Callable[[str, object], None]
) -> None:
    compiled = build(0, profile="fast", chunk=64, hidden=hidden, intermediate=hidden)
    kl, top1 = measure_fast(compiled, compiled.random_ids(200), record_property)
    assert kl < MAX_KL
    assert top1 > 0.9


# --- nano -------------------------------------------------------------------------------------


def compile_nano(profile: str, folder: Path) -> Compiled:
    path = compile_model("nano", output=folder / "nano.osc", profile=profile, context=512)
    config, tensors = read_checkpoint(NANO)
    return Compiled(path, load(path), config, tensors)


def nano_answer(model: Model, question: str, reasoning: str) -> tuple[list[int], list[int]]:
    """(prompt ids, ids of the greedy answer)."""
    assert model.tokenizer is not None
    messages = [{"role": "user", "content": question}]
    prompt = render_chat(messages, model.tokenizer, reasoning=reasoning, current_date="2026-01-01")
    return prompt, [token.token_id for token in model.generate(prompt, max_tokens=128)]


NANO_QUESTIONS = (
    ("What is 17 + 25?", "low"),
    ("What is 17 + 25?", "high"),
    ("What is 423 - 158?", "medium"),
    ("Hello!", "medium"),
)


def test_nano_exact_says_what_the_reference_says(tmp_path: Path) -> None:
    """Greedily; a token may differ only where float32 cannot tell the best two apart."""
    nano = compile_nano("exact", tmp_path)
    for question, reasoning in NANO_QUESTIONS:
        prompt, answer = nano_answer(nano.model, question, reasoning)
        expected = reference.Model(nano.config, nano.tensors).logits(prompt + answer)
        scored = nano.model.logits(prompt + answer)
        assert relative_rms(scored, expected) < EXACT
        rows = expected[len(prompt) - 1 : -1]
        lead = rows.max(axis=1) - rows[np.arange(len(answer)), answer]
        assert len(answer) > 3
        assert lead.max() < 1e-4, (question, lead.argmax())


def test_nano_fast_is_close_to_float64(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    nano = compile_nano("fast", tmp_path)
    ids = [i for q, r in NANO_QUESTIONS for part in nano_answer(nano.model, q, r) for i in part]
    kl, top1 = measure_fast(nano, ids[:500], record_property)
    assert kl < MAX_KL
    assert top1 > 0.97
