"""Logits far into a context, against the float64 reference, and the memory that they take.

The model has two layers, of which the second sees everything: its output is computed at the
compared positions alone, so that the reference takes minutes, not days. The whole of a context of
131,072 positions takes ten minutes: `pytest -m long tests/test_long_context.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from random_model import random_model, write_checkpoint
from reference import apply_rope, relative_rms

import osscompile
from osscompile.runtime import load
from osscompile.runtime.memory import memory_bytes
from osscompile.targets import Target

F64 = NDArray[np.float64]
EXACT = 1e-5  # relative rms to float64, as in test_model.py
WINDOW = 128
ROWS = 4096  # of the reference at once


class Judge(reference.Model):
    """The reference, a part of the positions after the other."""

    def logits_at(self, ids: list[int], positions: list[int]) -> F64:
        x = reference.to_float64(self.tensors["model.embed_tokens.weight"][np.array(ids)])
        q, k, v = self._projected(0, x)
        mixed = [
            reference.attention(
                q[start : start + ROWS],
                k[max(0, start - WINDOW) : start + ROWS],
                v[max(0, start - WINDOW) : start + ROWS],
                self._weight("model.layers.0.self_attn.sinks"),
                WINDOW,
            )
            for start in range(0, len(ids), ROWS)
        ]
        x = self._finish(0, x, np.concatenate(mixed))
        q, k, v = self._projected(1, x)
        rows = [
            reference.attention(
                q[at : at + 1],
                k[: at + 1],
                v[: at + 1],
                self._weight("model.layers.1.self_attn.sinks"),
                None,
            )
            for at in positions
        ]
        x = self._finish(1, x[positions], np.concatenate(rows))
        logits: F64 = self._norm("model.norm", x) @ self._weight("lm_head.weight").T
        return logits

    def _projected(self, layer: int, x: F64) -> tuple[F64, F64, F64]:
        """Rotated queries, rotated keys, and values."""
        h = self._norm(f"model.layers.{layer}.input_layernorm", x)
        q, k, v = (
            self._linear(f"model.layers.{layer}.self_attn.{part}_proj", h).reshape(len(x), -1, 64)
            for part in "qkv"
        )
        at = np.arange(len(x))
        return apply_rope(q, at, *self.rope()), apply_rope(k, at, *self.rope()), v

    def _finish(self, layer: int, x: F64, mixed: F64) -> F64:
        """The residual stream after a layer whose attention, before o_proj, is `mixed`."""
        x = x + self._linear(f"model.layers.{layer}.self_attn.o_proj", mixed.reshape(len(x), -1))
        return np.concatenate(
            [
                x[start : start + ROWS] + self._moe(layer, x[start : start + ROWS], {})
                for start in range(0, len(x), ROWS)
            ]
        )


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param([127, 128, 4095, 4097], id="4097"),
        pytest.param([4095, 4097, 32_768, 100_000, 131_071], id="131071", marks=pytest.mark.long),
    ],
)
@pytest.mark.filterwarnings("ignore:.* has no tokenizer.json")
def test_logits_and_memory(positions: list[int], this_machine: Target, tmp_path: Path) -> None:
    # every token goes to all experts, so that rounding cannot send it to others
    config, tensors = random_model(
        layers=2, heads=2, kv_heads=1, window=WINDOW, experts=2, experts_per_token=2
    )
    write_checkpoint(tmp_path / "model", config, tensors)
    path = osscompile.compile(
        tmp_path / "model",
        this_machine.name,
        tmp_path / "out.osc",
        profile="exact",
        variants=[this_machine.variant],
        context=positions[-1] + 1,
    )
    ids = np.random.default_rng(3).integers(0, config["vocab_size"], positions[-1] + 1).tolist()
    judge = Judge(config, tensors)
    np.testing.assert_allclose(  # the judge judges as the reference does
        judge.logits_at(ids[:300], [0, 127, 128, 299]), judge.logits(ids[:300])[[0, 127, 128, 299]]
    )
    model = load(path)
    before = resident_bytes()
    found = np.stack([model.prefill(ids[: at + 1]) for at in positions])
    grown = resident_bytes() - before
    expected = judge.logits_at(ids, positions)
    for at, actual, right in zip(positions, found, expected, strict=True):
        error = relative_rms(actual, right)
        print(f"position {at}: {error:.1e}")
        assert error < EXACT, at
    assert model.cached_tokens == positions[-2] + 1
    needed = memory_bytes(model.manifest, model.context)
    print(f"grown by {grown / 1e6:.1f} MB, {needed}")
    assert grown < 1.05 * needed["KV cache"] + needed["workspace"] + needed["weights"] + (8 << 20)


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10
