"""Write checkpoints in the layout of Hugging Face from any canonical source, for tests only.

This follows the checkpoint's published layout, not the importer, so that a round trip through both
compares two readings of the layout.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from osscompile.importer.checkpoint import Source
from osscompile.importer.config import ModelConfig
from osscompile.importer.synthetic import SyntheticSource


def write_checkpoint(
    directory: Path,
    source_or_config: Source | ModelConfig,
    *,
    shards: int = 2,
    tensors: dict[str, np.ndarray] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write config.json and shards with an index (shards=1: one model.safetensors, no index).

    `tensors` and `config` replace what the source would give, to write broken checkpoints.
    """
    source = source_or_config
    if isinstance(source, ModelConfig):
        source = SyntheticSource(source)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or config_json(source.config)))
    tensors = hf_tensors(source) if tensors is None else tensors
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    names = list(tensors)
    for shard in range(shards):  # published files count from zero and name the last as total
        file = f"model-{shard:05d}-of-{shards - 1:05d}.safetensors"
        held = names[shard::shards]
        write_safetensors(directory / file, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def hf_tensors(source: Source) -> dict[str, np.ndarray]:
    """Return all tensors by Hugging Face name, with gate/up rows interleaved and q, k, v apart."""
    config = source.config

    def read(name: str) -> np.ndarray:
        return source.read(name, 0, source.shape(name)[0])

    tensors = {"model.embed_tokens.weight": read("embed.weight")}
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        tensors[f"{theirs}.input_layernorm.weight"] = read(f"{ours}.attn_norm.weight")
        for kind in ("weight", "bias"):
            rows = read(f"{ours}.qkv.{kind}")
            tensors[f"{theirs}.self_attn.q_proj.{kind}"] = rows[:q]
            tensors[f"{theirs}.self_attn.k_proj.{kind}"] = rows[q : q + kv]
            tensors[f"{theirs}.self_attn.v_proj.{kind}"] = rows[q + kv :]
            tensors[f"{theirs}.self_attn.o_proj.{kind}"] = read(f"{ours}.out.{kind}")
            tensors[f"{theirs}.mlp.router.{kind}"] = read(f"{ours}.router.{kind}")
        tensors[f"{theirs}.self_attn.sinks"] = read(f"{ours}.sinks")
        tensors[f"{theirs}.post_attention_layernorm.weight"] = read(f"{ours}.mlp_norm.weight")
        for kind in ("blocks", "scales", "bias"):
            halves = read(f"{ours}.gate_up.{kind}")
            rows = np.empty((halves.shape[0], 2 * halves.shape[2], *halves.shape[3:]), halves.dtype)
            rows[:, 0::2] = halves[:, 0]
            rows[:, 1::2] = halves[:, 1]
            tensors[f"{theirs}.mlp.experts.gate_up_proj_{kind}"] = rows
            tensors[f"{theirs}.mlp.experts.down_proj_{kind}"] = read(f"{ours}.down.{kind}")
    tensors["model.norm.weight"] = read("norm.weight")
    tensors["lm_head.weight"] = read("lm_head.weight")
    return tensors


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of transformers 4 that describes this model."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "experts_per_token": config.num_experts_per_token,
        "sliding_window": config.window,
        "layer_types": [
            "sliding_attention" if sliding else "full_attention" for sliding in config.sliding
        ],
        "max_position_embeddings": config.max_context,
        "initial_context_length": config.rope.original_context,
        "rms_norm_eps": config.norm_eps,
        "swiglu_limit": config.swiglu_limit,
        "rope_theta": config.rope.theta,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": config.rope.factor,
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "original_max_position_embeddings": config.rope.original_context,
            "truncate": config.rope.truncate,
        },
        "quantization_config": {"quant_method": "mxfp4"},
    }


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one safetensors file; bfloat16 arrays become BF16, uint8 U8, and so on."""
    labels = {"bfloat16": "BF16", "uint8": "U8", "float16": "F16", "float32": "F32"}
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": labels[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    write_container(path, header, b"".join(array.tobytes() for array in tensors.values()))


def write_container(path: Path, header: object, data: bytes = b"") -> None:
    """Write any JSON (or raw bytes) as the header of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
