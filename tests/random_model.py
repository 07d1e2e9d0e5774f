"""Make seeded random gpt-oss models in Hugging Face layout, and their files, for the tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[Any]

SAFETENSORS_DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "U8": np.uint8}
MXFP4_RMS = 2.93  # of a uniformly drawn MXFP4 code
GATE_UP_RMS = 3.0  # one gate in a hundred passes the clamp at 7


def random_model(
    seed: int = 0,
    *,
    layers: int = 4,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    experts: int = 8,
    experts_per_token: int = 4,
    window: int = 16,
    vocab: int = 320,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config.json, tensors by name): bfloat16, with MXFP4 experts; even layers slide.

    Numbers are scaled so that every part matters: logits spread over a few units, sinks take a
    visible share, no bias is zero, some gates and ups lie beyond the clamp, block scales differ.
    """
    if hidden % 32 or intermediate % 32:
        raise ValueError(f"hidden {hidden} and intermediate {intermediate}: multiples of 32 wanted")
    rng = np.random.default_rng(seed)

    def normal(*shape: int, rms: float, mean: float = 0.0) -> Tensor:
        return (mean + rms * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    def matrix(out: int, inputs: int, rms: float) -> Tensor:
        """Return [out, inputs] that turns inputs of rms 1 into outputs of this rms."""
        return normal(out, inputs, rms=rms / math.sqrt(inputs))

    def mxfp4(out: int, inputs: int, rms: float) -> tuple[Tensor, Tensor]:
        """Return blocks [E, out, G, 16] and scales [E, out, G], for outputs of about this rms."""
        groups = inputs // 32
        blocks = rng.integers(0, 256, (experts, out, groups, 16), dtype=np.uint8)
        exponent = round(math.log2(rms / (MXFP4_RMS * math.sqrt(inputs))))
        scales = 127 + exponent + rng.integers(-1, 2, (experts, out, groups))
        return blocks, scales.astype(np.uint8)

    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": normal(vocab, hidden, rms=1.0),
        "lm_head.weight": matrix(vocab, hidden, rms=3.0),
        "model.norm.weight": normal(hidden, rms=0.2, mean=1.0),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{norm}.weight"] = normal(hidden, rms=0.2, mean=1.0)
        for part, width in widths.items():
            tensors[f"{at}self_attn.{part}_proj.weight"] = matrix(width, hidden, rms=1.0)
            tensors[f"{at}self_attn.{part}_proj.bias"] = normal(width, rms=0.3)
        tensors[at + "self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim, rms=1.0)
        tensors[at + "self_attn.o_proj.bias"] = normal(hidden, rms=0.2)
        tensors[at + "self_attn.sinks"] = normal(heads, rms=1.0, mean=1.0)
        tensors[at + "mlp.router.weight"] = matrix(experts, hidden, rms=1.5)
        tensors[at + "mlp.router.bias"] = normal(experts, rms=0.5)
        shapes = {"gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}
        for part, (out, inputs) in shapes.items():
            # The clamped product of gate and up has an rms near 6: down brings it back below 1.
            blocks, scales = mxfp4(out, inputs, GATE_UP_RMS if part == "gate_up" else 0.15)
            tensors[f"{at}mlp.experts.{part}_proj_blocks"] = blocks
            tensors[f"{at}mlp.experts.{part}_proj_scales"] = scales
            tensors[f"{at}mlp.experts.{part}_proj_bias"] = normal(experts, out, rms=0.5)

    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_local_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "experts_per_token": experts_per_token,
        "sliding_window": window,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "eos_token_id": vocab - 1,
        "pad_token_id": vocab - 2,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    return config, tensors


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write `config.json` and `model.safetensors` into the folder; returns the folder."""
    dtypes = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (config.json, tensors by name) from a folder with one `model.safetensors`."""
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(data[start + first : start + last], np.uint8)
            dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
            tensors[name] = flat.view(dtype).reshape(entry["shape"])
    return json.loads((folder / "config.json").read_text()), tensors
