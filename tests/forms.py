"""Write one model in the forms that people have: for tests only.

Written from the published layouts, with other people's writers where there are some, so that
reading them back compares two readings of each.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from checkpoints import config_json, hf_tensors, write_checkpoint, write_safetensors
from gguf import GGMLQuantizationType as Type

from osscompile.importer.checkpoint import Source
from osscompile.importer.config import ModelConfig

Tensors = dict[str, np.ndarray]
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[.., groups, 16] and [.., groups] -> [.., inputs] float32, two inputs a byte, low first."""
    values = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1).reshape(*scales.shape, 32)
    return np.ldexp(values, scales.astype(int)[..., None] - 127).reshape(*scales.shape[:-1], -1)


def dense_experts(tensors: Tensors) -> Tensors:
    """Hugging Face tensors with float32 experts [experts, inputs, rows] under the plain names."""
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            weights = dequantised(tensor, tensors[name.replace("_blocks", "_scales")])
            dense[name.removesuffix("_blocks")] = np.ascontiguousarray(weights.swapaxes(1, 2))
        elif not name.endswith("_scales"):
            dense[name] = tensor
    return dense


def mislabelled(tensors: Tensors) -> Tensors:
    """As some versions of transformers save a dequantised model: dense, but called blocks."""
    experts = (".gate_up_proj", ".down_proj")
    return {f"{n}_blocks" if n.endswith(experts) else n: t for n, t in tensors.items()}


def by_expert(tensors: Tensors) -> Tensors:
    """A module an expert, [rows, inputs], and the router one level deeper."""
    split = {}
    for name, tensor in tensors.items():
        stem, _, end = name.rpartition(".")
        part, _, _ = end.partition("_bias")
        if ".experts." in name:
            for index, expert in enumerate(tensor):
                kind = "bias" if end.endswith("_bias") else "weight"
                split[f"{stem}.{part}s.{index}.{kind}"] = np.ascontiguousarray(expert.T)
        else:
            split[name.replace("mlp.router.", "mlp.router.linear.")] = tensor
    return split


def cast(tensors: Tensors, dtype: Any) -> Tensors:
    return {n: t if t.dtype == np.uint8 else t.astype(dtype) for n, t in tensors.items()}


def plain_config(config: ModelConfig) -> dict[str, Any]:
    """config.json without a quantisation."""
    return {k: v for k, v in config_json(config).items() if k != "quantization_config"}


def write_dense(
    folder: Path,
    source: Source,
    dtype: Any = ml_dtypes.bfloat16,
    change: Callable[[Tensors], Tensors] = dict,
) -> Path:
    """A fine-tune as transformers saves it, or another way of naming it."""
    tensors = change(cast(dense_experts(hf_tensors(source)), dtype))
    config = plain_config(source.config)
    return write_checkpoint(folder, source, tensors=tensors, config=config)


ORIGINAL_NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


def write_original(folder: Path, source: Source) -> Path:
    """OpenAI's own form; the tokenizer would lie one folder up."""
    config = source.config
    theirs = hf_tensors(source)
    tensors = {}
    for name, tensor in theirs.items():
        _, index, rest = (
            name.removeprefix("model.").split(".", 2) if ".layers." in name else (0,) * 3
        )
        if rest and rest in ORIGINAL_NAMES:
            tensors[f"block.{index}.{ORIGINAL_NAMES[rest]}"] = tensor
        elif name in ORIGINAL_NAMES:
            tensors[ORIGINAL_NAMES[name]] = tensor
    for index in range(config.num_layers):
        at = f"model.layers.{index}.self_attn."
        for kind in ("weight", "bias"):
            parts = [theirs[f"{at}{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"block.{index}.attn.qkv.{kind}"] = np.concatenate(parts)
    folder.mkdir(parents=True)
    fields = {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_token,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.window,
        "initial_context_length": config.rope.original_context,
        "rope_theta": config.rope.theta,
        "rope_scaling_factor": config.rope.factor,
        "rope_ntk_alpha": config.rope.beta_slow,
        "rope_ntk_beta": config.rope.beta_fast,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


GGUF_LAYER_NAMES = {
    "attn_norm.weight": "attn_norm.weight",
    "sinks": "attn_sinks.weight",
    "out.weight": "attn_output.weight",
    "out.bias": "attn_output.bias",
    "mlp_norm.weight": "post_attention_norm.weight",
    "router.weight": "ffn_gate_inp.weight",
    "router.bias": "ffn_gate_inp.bias",
    "down.bias": "ffn_down_exps.bias",
}


def ggml_blocks(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Hugging Face's MXFP4 -> ggml's: [.., groups * 17] uint8."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    halves = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], halves], -1).reshape(*scales.shape[:-1], -1)


def gguf_tensors(source: Source, dense: Type) -> dict[str, tuple[np.ndarray, Type]]:
    """As llama.cpp's converter names and stores them: matrices of attention and both embeddings as
    `dense`, experts MXFP4, the rest float32."""
    config = source.config

    def read(name: str) -> np.ndarray:
        array = source.read(name, 0, source.shape(name)[0])
        return array if array.dtype == np.uint8 else array.astype(np.float32)

    def matrix(rows: np.ndarray) -> tuple[np.ndarray, Type]:
        return gguf.quants.quantize(rows, dense), dense

    tensors = {
        "token_embd.weight": matrix(read("embed.weight")),
        "output.weight": matrix(read("lm_head.weight")),
        "output_norm.weight": (read("norm.weight"), Type.F32),
    }
    q, kv = config.q_size, config.kv_size
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"blk.{index}."
        for name, theirs_name in GGUF_LAYER_NAMES.items():
            array = read(ours + name)
            plain = array.ndim == 1 or name.startswith(("router", "down"))
            tensors[theirs + theirs_name] = (array, Type.F32) if plain else matrix(array)
        for part, rows in zip(
            "qkv", (slice(0, q), slice(q, q + kv), slice(q + kv, None)), strict=True
        ):
            tensors[f"{theirs}attn_{part}.weight"] = matrix(read(f"{ours}qkv.weight")[rows])
            tensors[f"{theirs}attn_{part}.bias"] = (read(f"{ours}qkv.bias")[rows], Type.F32)
        packed = {
            p: ggml_blocks(read(f"{ours}{p}.blocks"), read(f"{ours}{p}.scales"))
            for p in ("gate_up", "down")
        }
        for half, name in enumerate(("gate", "up")):
            tensors[f"{theirs}ffn_{name}_exps.weight"] = (packed["gate_up"][:, half], Type.MXFP4)
            tensors[f"{theirs}ffn_{name}_exps.bias"] = (
                read(f"{ours}gate_up.bias")[:, half],
                Type.F32,
            )
        tensors[f"{theirs}ffn_down_exps.weight"] = (packed["down"], Type.MXFP4)
    return tensors


def gguf_fields(config: ModelConfig) -> dict[str, Any]:
    """Metadata after the architecture's name, of llama.cpp's converter."""
    return {
        "block_count": config.num_layers,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.window,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope.theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": config.rope.factor,
        "rope.scaling.original_context_length": config.rope.original_context,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_token,
    }


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, tuple[np.ndarray, Type]],
    *,
    architecture: str = "gpt-oss",
    fields: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    general: dict[str, Any] | None = None,
    split: int = 0,
) -> Path:
    """One GGUF, or several of `split` tensors each. `tokenizer`: keys after `tokenizer.ggml.`;
    `general`: whole keys."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in (gguf_fields(config) if fields is None else fields).items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    for key, value in (general or {}).items():
        _add(writer, key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    with warnings.catch_warnings(action="ignore"):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def ollama_tensors(source: Source, dense: Type) -> dict[str, tuple[np.ndarray, Type]]:
    """As Ollama's current converter names them: gate and up apart, biases in bfloat16."""
    renamed = {}
    for name, (array, kind) in gguf_tensors(source, dense).items():
        new = name.replace("post_attention_norm", "ffn_norm").replace("attn_output", "attn_out")
        new = new.replace("attn_sinks.weight", "attn_sinks")
        if new.endswith(".bias"):
            array, kind = gguf.quants.quantize(array, Type.BF16), Type.BF16
        renamed[new] = (array, kind)
    return renamed


def old_ollama_tensors(source: Source, dense: Type) -> dict[str, tuple[np.ndarray, Type]]:
    """As its first converter did: q, k and v in one tensor, gate and up rows by turns, and MXFP4
    with neighbouring inputs in a byte (see `relabel_mxfp4`)."""
    tensors = ollama_tensors(source, dense)
    theirs = hf_tensors(source)
    for index in range(source.config.num_layers):
        at = f"blk.{index}."
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"{at}attn_{part}.{kind}") for part in "qkv"]
            joined = np.concatenate([array for array, _ in parts])
            tensors[f"{at}attn_qkv.{kind}"] = (joined, parts[0][1])
        for name in ("gate", "up"):
            del tensors[f"{at}ffn_{name}_exps.weight"], tensors[f"{at}ffn_{name}_exps.bias"]
        for name, part in (("ffn_gate_up_exps", "gate_up"), ("ffn_down_exps", "down")):
            stem = f"model.layers.{index}.mlp.experts.{part}_proj"
            blocks, scales = theirs[f"{stem}_blocks"], theirs[f"{stem}_scales"]
            raw = np.concatenate([scales[..., None], blocks], -1).reshape(*scales.shape[:-1], -1)
            tensors[f"{at}{name}.weight"] = (raw, Type.MXFP4)
            bias = theirs[f"{stem}_bias"].astype(np.float32)
            tensors[f"{at}{name}.bias"] = (gguf.quants.quantize(bias, Type.BF16), Type.BF16)
    return tensors


def ollama_fields(config: ModelConfig) -> dict[str, Any]:
    """It makes a zero of an initial_context_length that config.json does not have."""
    dropped = ("rope.scaling.type", "expert_feed_forward_length")
    fields = {k: v for k, v in gguf_fields(config).items() if k not in dropped}
    return fields | {"rope.scaling.original_context_length": 0}


def relabel_mxfp4(path: Path) -> None:
    """Give MXFP4 tensors the type number 4, which no writer knows any more."""
    data = bytearray(path.read_bytes())
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == Type.MXFP4:
            kind = tensor.field.parts[4]
            assert kind[0] == Type.MXFP4
            data[kind.ctypes.data - _start(tensor) : kind.ctypes.data - _start(tensor) + 4] = (
                b"\4\0\0\0"
            )
    path.write_bytes(data)


def _start(tensor: gguf.ReaderTensor) -> int:
    """Address of the mapped file."""
    return int(tensor.field.parts[0].ctypes.data) - int(tensor.field.offset)


def gguf_tokenizer(path: Path, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.ggml` fields that llama.cpp's converter makes of a tokenizer.json."""
    fields = json.loads(path.read_text())
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, id in fields["model"]["vocab"].items():
        tokens[id], types[id] = token, int(gguf.TokenType.NORMAL)
    for token in fields["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], int(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in fields["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": "gpt-4o",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": 200002 if vocab_size > 200002 else 7,
        "eos_token_ids": [9, 7],
    }
