"""config.json in every accepted spelling, and in those that are refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from osscompile.errors import CheckpointError
from osscompile.importer.config import ModelConfig, RopeConfig, parse_config, read_config
from osscompile.importer.synthetic import synthetic_source

# The values of openai/gpt-oss-20b, in its spelling (transformers 4.55).
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


def parsed(changes: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> ModelConfig:
    raw = copy.deepcopy(GPT_OSS_20B) | (changes or {})
    for key in without:
        del raw[key]
    return parse_config(raw, "config.json")


def rope(**changes: Any) -> dict[str, Any]:
    fields = GPT_OSS_20B["rope_scaling"] | changes
    return {"rope_scaling": {key: value for key, value in fields.items() if value is not None}}


def test_gpt_oss_20b() -> None:
    config = parsed()
    assert config == ModelConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=24,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=32,
        num_experts_per_token=4,
        window=128,
        sliding=(True, False) * 12,
        max_context=131072,
        norm_eps=1e-5,
        swiglu_limit=7.0,
        rope=RopeConfig(150000.0, 32.0, 32.0, 1.0, 4096, False),
    )
    assert (config.q_size, config.kv_size, config.qkv_size) == (4096, 512, 5120)
    assert (config.heads_per_kv_head, config.hidden_blocks, config.intermediate_blocks) == (
        8,
        90,
        90,
    )
    assert config == synthetic_source("gpt-oss-20b").config


def test_spelling_of_transformers_5() -> None:
    moved = {
        "rope_parameters": GPT_OSS_20B["rope_scaling"] | {"rope_theta": 150000},
        "rope_scaling": None,
    }
    assert parsed(moved, without=("rope_theta",)) == parsed()


def test_rope_type_in_the_oldest_spelling() -> None:
    assert parsed(rope(rope_type=None, type="yarn")) == parsed()


def test_experts_per_token_alone() -> None:
    assert parsed(without=("num_experts_per_tok",)).num_experts_per_token == 4


def test_layer_types_missing_alternate_sliding_first() -> None:
    assert parsed(without=("layer_types",)).sliding == (True, False) * 12


def test_truncate_missing_is_true() -> None:
    assert parsed(rope(truncate=None)).rope.truncate is True


def test_original_context_from_initial_context_length() -> None:
    assert parsed(rope(original_max_position_embeddings=None)) == parsed()


def test_window_of_nothing_where_no_layer_slides() -> None:
    config = parsed({"sliding_window": None, "layer_types": ["full_attention"] * 24})
    assert not any(config.sliding) and config.window == config.max_context


def test_number_of_experts_under_one_of_its_names_alone() -> None:
    assert parsed({"num_local_experts": None, "num_experts": 32}) == parsed()
    assert parsed({"num_experts_per_tok": None}) == parsed()


def test_rotary_factor_of_all_dimensions() -> None:
    assert parsed({"partial_rotary_factor": 1.0} | rope(partial_rotary_factor=1)) == parsed()


NEEDED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "sliding_window",
    "max_position_embeddings",
    "rms_norm_eps",
    "swiglu_limit",
    "rope_theta",
    "rope_scaling",
)


@pytest.mark.parametrize("key", NEEDED)
def test_missing_key(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*{key}: expected .* found nothing"):
        parsed(without=(key,))


def test_size_under_an_empty_name_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size: expected .* found nothing"):
        parsed({"": 2880}, without=("hidden_size",))


NONSENSE = {
    "another_architecture": ({"model_type": "llama"}, "model_type: expected 'gpt_oss'.*'llama'"),
    "tied_embeddings_are_text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "a_classifier": (
        {"architectures": ["GptOssForSequenceClassification"]},
        "architectures: expected GptOssForCausalLM, found .*SequenceClassification.*classifier",
    ),
    "architectures_are_a_number": ({"architectures": 3}, "architectures: expected a list"),
    "no_attention_bias": ({"attention_bias": False}, "attention_bias"),
    "another_activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "heads_not_divisible": ({"num_key_value_heads": 7}, "divisor of num_attention_heads = 64"),
    "hidden_not_in_blocks": ({"hidden_size": 2870}, "hidden_size: expected a multiple of 32"),
    "intermediate_not_in_blocks": ({"intermediate_size": 100}, "intermediate_size: .* of 32"),
    "head_dim_not_in_vectors": ({"head_dim": 60}, "head_dim: expected a multiple of 8"),
    "queries_not_in_blocks": (
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
        "num_attention_heads x head_dim to be a multiple of 32",
    ),
    "yarn_ramp_of_no_width": (rope(beta_fast=1.0), "beta_fast > beta_slow"),
    "zero_layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "a_billion_layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "size_is_text": ({"vocab_size": "201088"}, "vocab_size: expected a whole number"),
    "size_is_true": ({"head_dim": True}, "head_dim: expected a whole number"),
    "more_active_experts_than_experts": ({"num_experts_per_tok": 33}, "at most .* 32"),
    "layer_types_too_short": ({"layer_types": ["full_attention"]}, "layer_types: expected 24"),
    "layer_types_too_long": (
        {"layer_types": ["sliding_attention", "full_attention"] * 12 + ["full_attention"]},
        "layer_types: expected 24",
    ),
    "layer_types_unknown": ({"layer_types": ["linear_attention"] * 24}, "layer_types"),
    "epsilon_is_nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive"),
    "theta_is_astronomic": ({"rope_theta": 10**400}, "rope_theta: expected a positive"),
    "limit_is_zero": ({"swiglu_limit": 0}, "swiglu_limit: expected a positive"),
    "unsupported_rope_type": (rope(rope_type="linear"), "rope_type: expected 'yarn'"),
    "factor_missing": (rope(factor=None), "rope_scaling: factor: expected .* found nothing"),
    "factor_below_one": (rope(factor=0.5), "factor >= 1"),
    "attention_factor_overridden": (rope(attention_factor=1.0), "attention_factor"),
    "half_is_rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0"),
    "half_is_rotated_in_rope": (
        rope(partial_rotary_factor=0.5),
        "rope_scaling: partial_rotary_factor: expected 1.0.*found 0.5",
    ),
    "no_window_where_layers_slide": ({"sliding_window": None}, "sliding_window: expected"),
    "truncate_is_text": (rope(truncate="no"), "truncate: expected true or false"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense(case: str) -> None:
    changes, message = NONSENSE[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        parsed(changes)
    assert "config.json" in str(caught.value)


def test_read_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B))
    assert read_config(tmp_path) == parsed()


@pytest.mark.parametrize("text", ["{", "[]", "[" * 200_000, "\udcff"])
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json: (not JSON|expected a JSON object)"):
        read_config(tmp_path)
