"""Shapes that fine-tuners make: what opens, what compiles, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from forms import cast, dense_experts
from random_model import random_model, write_checkpoint
from reference import relative_rms

import osscompile
from osscompile.errors import CheckpointError
from osscompile.importer.forms import open_checkpoint
from osscompile.runtime import load
from osscompile.targets import Target

EXACT = 1e-5  # relative rms to float64, as in test_model.py
EMBED, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
PRUNED = {
    "layers": 3,
    "hidden": 96,
    "intermediate": 160,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 32,
    "experts": 11,
    "experts_per_token": 3,
    "vocab": 331,
    "window": 7,
}


def of_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE in one object, both names for the number of experts, no quantisation."""
    moved = ("rope_scaling", "rope_theta", "quantization_config", "experts_per_token")
    fields = {key: value for key, value in config.items() if key not in moved}
    rope = config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    return fields | {"rope_parameters": rope, "num_experts": config["num_local_experts"]}


def test_pruned_fine_tune_with_tied_embeddings(this_machine: Target, tmp_path: Path) -> None:
    """11 experts of which 3 are active, bfloat16, other window, vocabulary and order of layers."""
    config, tensors = random_model(3, **PRUNED)
    config["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    tensors[OUTPUT] = tensors[EMBED]
    stored = cast(dense_experts(tensors), ml_dtypes.bfloat16)
    del stored[OUTPUT]
    write_checkpoint(
        tmp_path / "m", of_transformers_5(config) | {"tie_word_embeddings": True}, stored
    )
    with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
        artifact = osscompile.compile(
            tmp_path / "m",
            this_machine.name,
            tmp_path / "m.osc",
            variants=[this_machine.variant],
            profile="exact",
            context=64,
            prefill_chunk=32,
        )
    ids = np.random.default_rng(1).integers(0, 331, 40).tolist()
    expected = reference.Model(config, tensors).logits(ids)
    assert relative_rms(load(artifact).logits(ids), expected) < EXACT


def test_padded_embeddings(tmp_path: Path) -> None:
    """Rows beyond the vocabulary, which some training code adds, are left out."""
    config, tensors = random_model(3, **PRUNED)
    padded = {name: np.pad(tensors[name], ((0, 21), (0, 0))) for name in (EMBED, OUTPUT)}
    source = open_checkpoint(write_checkpoint(tmp_path, config, tensors | padded)).source
    assert source.config.vocab_size == 331
    for name, ours in ((EMBED, "embed.weight"), (OUTPUT, "lm_head.weight")):
        np.testing.assert_array_equal(source.read(ours, 0, 331), tensors[name])


def test_embeddings_with_fewer_rows_than_the_vocabulary(tmp_path: Path) -> None:
    config, tensors = random_model(3, **PRUNED)
    write_checkpoint(tmp_path, config, tensors | {OUTPUT: tensors[OUTPUT][:330]})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: expected .*\[331, 96\], found .*330"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("experts", [4, 13, 28, 128])
def test_any_number_of_experts(tmp_path: Path, experts: int) -> None:
    shape = PRUNED | {"experts": experts, "layers": 1, "experts_per_token": 4}
    config, tensors = random_model(3, **shape)
    source = open_checkpoint(write_checkpoint(tmp_path, config, tensors)).source
    assert source.shape("layers.0.down.bias") == (experts, 96)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_of_no_blocks": ({"hidden_size": 100}, "hidden_size: .* multiple of 32.*found 100"),
    "no_experts": ({"num_local_experts": 0}, "num_local_experts: expected .* from 1 .*found 0"),
    "more_active_than_there_are": (
        {"num_experts_per_tok": 12},
        "num_experts_per_tok: .* at most .*11, found 12",
    ),
    "no_bias": ({"attention_bias": False}, "attention_bias: expected True.*found False"),
    "no_window": ({"sliding_window": None}, "sliding_window: expected .*found None"),
    "other_layers": (
        {"layer_types": ["chunked_attention"] * 3},
        "layer_types: expected 3 names .* sliding_attention or full_attention, found",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_shape_that_cannot_be_compiled(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    config, _ = random_model(3, **PRUNED)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        open_checkpoint(tmp_path)
