"""reference.py against transformers, which shares no code with it: both read the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_model import random_model, write_checkpoint
from reference import F64, Ablation, Model, relative_rms, top1_agreement

TOLERANCE = 1e-4  # float32 against float64
NEEDED = "the oracle needs torch, transformers and accelerate: install the extra `oracle`"

pytestmark = pytest.mark.oracle


def transformers_logits(checkpoint: Path, token_ids: list[int]) -> F64:
    """Return logits [T, vocab] of GptOssForCausalLM: float32, eager, with experts from MXFP4."""
    torch = pytest.importorskip("torch", reason=NEEDED)
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    pytest.importorskip("accelerate", reason=NEEDED)
    model = transformers.GptOssForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    assert logits.dtype == torch.float32
    return np.asarray(logits.numpy(), np.float64)


@pytest.mark.parametrize(
    ("window", "num_tokens"),
    [
        pytest.param(16, 75, id="several_windows"),
        pytest.param(128, 127, id="one_short_of_the_window"),
        pytest.param(128, 129, id="one_past_the_window"),
    ],
)
def test_logits_equal_transformers(tmp_path: Path, window: int, num_tokens: int) -> None:
    config, tensors = random_model(seed=window, window=window)
    ids = np.random.default_rng(num_tokens).integers(0, config["vocab_size"], num_tokens).tolist()
    actual = transformers_logits(write_checkpoint(tmp_path, config, tensors), ids)
    expected = Model(config, tensors).logits(ids)
    assert relative_rms(actual, expected) <= TOLERANCE
    assert top1_agreement(expected, actual) == 1
    assert relative_rms(actual[-1], expected[-1]) <= TOLERANCE
    if num_tokens > window:  # only the last row shows a window that is wrong by one token
        wrong = Model(config, tensors, Ablation(window_offset=1)).logits(ids)
        assert relative_rms(wrong[-1], actual[-1]) > 10 * TOLERANCE


def test_logits_equal_transformers_past_4096_positions(tmp_path: Path) -> None:
    """This is beyond the context that YaRN extends; float32 angles are the largest error."""
    config, tensors = random_model(layers=2, heads=2, kv_heads=1, window=128)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 4200).tolist()
    actual = transformers_logits(write_checkpoint(tmp_path, config, tensors), ids)
    expected = Model(config, tensors).logits(ids)
    assert relative_rms(actual[4096:], expected[4096:]) <= TOLERANCE
