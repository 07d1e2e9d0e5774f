"""OpenAI's own form, the `original` folder beside the Hugging Face files."""

import re
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..checkpoint import Opened
from ..config import ModelConfig, has_file, parse_config, read_json_object
from ..generation import read_chat_template, read_generation
from .assemble import HalfNames, Plan, assemble
from .counts import refuse_other_count
from .shards import open_shards

_MODEL_NAMES = {
    "embed.weight": "embedding.weight",
    "norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "attn.norm.scale",
    "qkv.weight": "attn.qkv.weight",
    "qkv.bias": "attn.qkv.bias",
    "sinks": "attn.sinks",
    "out.weight": "attn.out.weight",
    "out.bias": "attn.out.bias",
    "mlp_norm.weight": "mlp.norm.scale",
    "router.weight": "mlp.gate.weight",
    "router.bias": "mlp.gate.bias",
    "gate_up.bias": "mlp.mlp1_bias",
    "down.bias": "mlp.mlp2_bias",
}
_LAYER = re.compile(r"block\.(\d{1,9})\.")
_EXPERTS = {"gate_up": "mlp.mlp1_weight", "down": "mlp.mlp2_weight"}

# Its config.json says nothing of these, its code does (gpt_oss/torch/model.py).
CONSTANTS = {"model_type": "gpt_oss", "rms_norm_eps": 1e-5}
MAX_CONTEXT = 131072


def recognises(path: Path) -> bool:
    """By the keys of config.json."""
    if not (path / "config.json").is_file():
        return False
    raw = read_json_object(path / "config.json")
    return "model_type" not in raw and "num_experts" in raw and "rope_scaling_factor" in raw


def open_form(path: Path) -> Opened:
    """Read config.json and the headers of the files, no weights. Raises CheckpointError."""
    config_path = path / "config.json"
    config = parse_config(_translate(read_json_object(config_path)), str(config_path))
    stored = open_shards(path)
    plan = _plan(config)
    refuse_other_count(stored, _LAYER, config.num_layers, "num_hidden_layers", config_path)
    for name in plan.names():
        if name not in stored:
            raise CheckpointError(
                f"{path}: expected tensor {name}, found {len(stored)} others; "
                "the checkpoint is incomplete: download it again"
            )
    # The tokenizer lies with the Hugging Face files, one folder up, wherever links lead from.
    above = path.resolve().parent
    tokenizers = (path / "tokenizer.json", above / "tokenizer.json")
    return Opened(
        assemble(config, plan, stored),
        next(filter(has_file, tokenizers), None),
        *read_generation(above),
        read_chat_template(above),
    )


def _translate(raw: dict[str, Any]) -> dict[str, Any]:
    """The config in Hugging Face's spelling."""
    factor, original = raw.get("rope_scaling_factor"), raw.get("initial_context_length")
    fields = raw | CONSTANTS
    fields["max_position_embeddings"] = MAX_CONTEXT
    if isinstance(factor, int | float) and isinstance(original, int) and 0 < factor < MAX_CONTEXT:
        fields["max_position_embeddings"] = int(factor * original)
    fields["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": raw.get("rope_ntk_beta", 32.0),
        "beta_slow": raw.get("rope_ntk_alpha", 1.0),
        "original_max_position_embeddings": original,
        "truncate": False,
    }
    return fields


def _plan(config: ModelConfig) -> Plan:
    plan = Plan({name: ((stored,),) for name, stored in _MODEL_NAMES.items()})
    for index in range(config.num_layers):
        for name, stored in _LAYER_NAMES.items():
            plan.tensors[f"layers.{index}.{name}"] = ((f"block.{index}.{stored}",),)
        for part, stored in _EXPERTS.items():
            stem = f"block.{index}.{stored}"
            halves = HalfNames((f"{stem}.blocks",), f"{stem}.scales")
            plan.experts[f"layers.{index}.{part}"] = (halves,)
    return plan
