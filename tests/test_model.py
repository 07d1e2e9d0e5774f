"""Whole compiled models of random weights against the float64 reference: `exact` on positions,
windows, shapes and extremes, `fast` on what it defines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from artifacts import run_python
from numpy.typing import NDArray
from random_model import random_model, write_checkpoint
from reference import Ablation, relative_rms

import osscompile
from osscompile.runtime import Model, load
from osscompile.targets import Target

EXACT = 1e-5  # relative rms to float64; measured 3e-7 to 1.1e-6
SAME = 1e-5  # relative rms between two ways to compute the same in float32
NOTICED = 100 * EXACT  # mistakes that the tests must notice are farther away; see MISTAKES
SAFE_MARGIN = 1e-5  # rounding may reorder router logits that are closer than this
WINDOW, CHUNK = 16, 32  # in the model `small`, whose rings hold 48 positions

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
        """Return logits [n, vocab]. Without an ablation it makes sure that rounding cannot reroute
        a token, so that a difference is a mistake."""
        trace: dict[str, NDArray[Any]] = {}
        logits = reference.Model(self.config, self.tensors, ablation).logits(ids, trace=trace)
        if ablation is None:
            assert min(router_margins(trace, self.config), default=1.0) > SAFE_MARGIN
        return logits

    def random_ids(self, count: int) -> list[int]:
        rng = np.random.default_rng(7)
        return [int(i) for i in rng.integers(0, self.model.vocab_size, count)]


def router_margins(trace: dict[str, NDArray[Any]], config: dict[str, Any]) -> Iterable[float]:
    """Yield each layer's smallest distance between a chosen expert and one not chosen."""
    k, num_experts = config["num_experts_per_tok"], config["num_local_experts"]
    for name, logits in trace.items():
        if name.endswith("router_logits") and k < num_experts:
            falling = -np.sort(-logits, axis=1)
            yield float((falling[:, k - 1] - falling[:, k]).min())


@pytest.fixture(scope="module")
def build(
    this_machine: Target, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Compiled]:
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
        checkpoint = write_checkpoint(folder / "checkpoint", config, tensors)
        with pytest.warns(UserWarning, match="no tokenizer.json"):
            path = osscompile.compile(
                checkpoint,
                this_machine.name,
                folder / "model.osc",
                variants=[this_machine.variant],
                profile=profile,
                context=context,
                prefill_chunk=chunk,
            )
        return Compiled(path, load(path), config, tensors)

    return build


@pytest.fixture(scope="module")
def small(build: Callable[..., Compiled]) -> Compiled:
    """A model with four layers, window 16, 4 queries per KV head."""
    return build(0, window=WINDOW)


@pytest.fixture(scope="module")
def long(build: Callable[..., Compiled]) -> Compiled:
    """A model with the window of gpt-oss, and a context beyond the one before YaRN."""
    return build(1, layers=2, heads=2, kv_heads=1, window=128, context=4400, chunk=512)


def check_exact(compiled: Compiled, ids: list[int], record: Callable[[str, object], None]) -> None:
    """Compare `score`, `prefill` and `decode` with the reference, as a whole and in the last row
    alone, because an error at the edge of a window would hide among many rows."""
    expected = compiled.reference(ids)
    scored = compiled.model.logits(ids)
    prefilled = compiled.model.prefill(ids)
    errors = {
        "all": relative_rms(scored, expected),
        "last": relative_rms(scored[-1], expected[-1]),
        "prefill": relative_rms(prefilled, expected[-1]),
    }
    if len(ids) > 1:
        compiled.model.prefill(ids[:-1])
        errors["decode"] = relative_rms(compiled.model.decode(ids[-1]), expected[-1])
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
    """The other tests would notice if the compiler forgot a part of the model."""
    ids = small.random_ids(75)
    wrong = small.reference(ids, MISTAKES[mistake])
    assert relative_rms(small.model.logits(ids), wrong) > NOTICED
    assert relative_rms(small.model.prefill(ids), wrong[-1]) > NOTICED


# --- exact: several ways to the same logits ---------------------------------------------------


@pytest.fixture(scope="module")
def at_once(build: Callable[..., Compiled]) -> Model:
    """The weights of `small`, compiled to prefill any prompt of its context in one call."""
    return build(0, window=WINDOW, chunk=256).model


@pytest.mark.parametrize(
    "count", [1, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, WINDOW + CHUNK + 1, 2 * CHUNK + 3, 250]
)
def test_prefill_at_once_in_chunks_and_token_by_token(
    small: Compiled, at_once: Model, count: int
) -> None:
    ids = small.random_ids(count)
    expected = at_once.prefill(ids)
    small.model._sequence.reuse(())
    assert relative_rms(small.model.prefill(ids), expected) < SAME
    small.model._sequence.reuse(())
    for token in ids:
        stepped = small.model.decode(token)
    assert relative_rms(stepped, expected) < SAME
    assert relative_rms(small.model.logits(ids)[-1], expected) < SAME


def test_last_position_of_the_context(small: Compiled) -> None:
    ids = small.random_ids(256)
    expected = small.reference(ids)[-1]
    assert relative_rms(small.model.prefill(ids), expected) < EXACT
    small.model.prefill(ids[:-1])
    assert relative_rms(small.model.decode(ids[-1]), expected) < EXACT


def test_number_of_threads_changes_nothing(small: Compiled, tmp_path: Path) -> None:
    """Each number runs in its own process, because TVM has one pool of threads per process."""
    script = """
import sys
import numpy as np
from osscompile.runtime import load

path, threads, out, *ids = sys.argv[1:]
model = load(path, threads=int(threads))
ids = [int(i) for i in ids]
np.save(out, np.stack([*model.logits(ids), model.prefill(ids), model.decode(0)]))
"""
    results = []
    for threads in (1, 2, 3):
        out = tmp_path / f"{threads}.npy"
        run_python(script, small.path, threads, out, *small.random_ids(100), cwd=tmp_path)
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


ALWAYS, NEVER = (1, 2, 5, 7), 3  # experts of layer 0, and an expert of layer 1


def go_to_extremes(tensors: Tensors) -> None:
    """Let the bias decide routing, put gates and ups far outside the clamp, and let sinks take
    everything or nothing."""

    def set_rows(name: str, rows: Any, value: float) -> None:
        tensors[f"model.layers.{name}"][rows] = ml_dtypes.bfloat16(value)

    set_rows("0.mlp.router.bias", list(ALWAYS), 50.0)
    set_rows("1.mlp.router.bias", NEVER, -50.0)
    bias = "1.mlp.experts.gate_up_proj_bias"
    for row, value in enumerate((30.0, 30.0, -30.0, -30.0, -300.0, 300.0, 300.0, -300.0)):
        set_rows(bias, (slice(None), row), value)  # even rows are gates, odd ones ups
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


class Q8Matrix:
    """A matrix m whose `x @ m.T` is as the profile `fast` defines it, with x in int8."""

    __array_ufunc__ = None  # numpy leaves `x @ self` to __rmatmul__

    def __init__(self, matrix: F64) -> None:
        self.matrix = matrix

    @property
    def T(self) -> Q8Matrix:
        return self

    def __rmatmul__(self, x: F64) -> F64:
        quantized: F64 = reference.dequantize_q8(*reference.quantize_q8(x)) @ self.matrix.T
        return quantized


class FastReference(reference.Model):
    """The model as `fast` defines it: only activations and dense weights are rounded, to int8."""

    def __init__(self, config: dict[str, Any], tensors: Tensors) -> None:
        embed = "model.embed_tokens.weight"
        rounded = round_to_q8(reference.to_float64(tensors[embed]))
        super().__init__(config, {**tensors, embed: rounded})

    def _weight(self, name: str) -> Any:
        weight = super()._weight(name)
        is_dense = name.endswith("_proj.weight") or name == "lm_head.weight"
        return Q8Matrix(round_to_q8(weight)) if is_dense else weight

    def _experts(self, name: str) -> Any:
        experts = super()._experts(name)
        return [Q8Matrix(experts[e]) for e in range(self.config["num_local_experts"])]


def round_to_q8(weight: F64) -> F64:
    """Round [out, in] to the nearest multiples of the scale, float16, of 32 inputs."""
    blocks = weight.reshape(len(weight), -1, reference.BLOCK)
    least = (np.abs(blocks).max(axis=-1) / 127).astype(np.float32)
    scale = least.astype(np.float16)
    scale = np.where(scale < least, np.nextafter(scale, np.float16(np.inf)), scale)
    steps = scale.astype(np.float64)[..., None]
    rounded: F64 = (np.rint(blocks / steps) * steps).reshape(weight.shape)
    return rounded


def to_float16(x: F64) -> F64:
    return x.astype(np.float16).astype(np.float64)


def test_fast_layer_computes_its_definition(
    build: Callable[..., Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is exact in tokens where rounding takes no int8 or float16 to its neighbour. More layers
    would spread such a step to all tokens."""
    compiled = build(1, profile="fast", layers=1)
    ids = compiled.random_ids(150)
    definition = FastReference(compiled.config, compiled.tensors)
    with monkeypatch.context() as patch:
        original = reference.attention
        patch.setattr(
            reference,
            "attention",
            lambda q, k, v, *rest: original(q, to_float16(k), to_float16(v), *rest),
        )
        expected = definition.logits(ids)
    logits = compiled.model.logits(ids)
    errors = [relative_rms(a, b) for a, b in zip(logits, expected, strict=True)]
    print(f"median {np.median(errors):.1e} largest {max(errors):.1e}")
    assert np.quantile(errors, 0.3) < EXACT
    assert max(errors) < 0.03
