"""Write nano as a Hugging Face gpt-oss checkpoint, and read it back.

`python -m osscompile.nano.export --state DIR --out DIR` turns the training's DIR/state.pt and
DIR/tokenizer.json into config.json, model.safetensors (MXFP4 experts, bfloat16 elsewhere) and the
rest.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from osscompile.nano.cases import STOP_TOKENS
from osscompile.nano.network import MXFP4_BLOCK, Nano, NanoConfig, round_to_mxfp4

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127

# Our parameter of a layer -> its name in the checkpoint; q, k, v and experts follow below.
LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "out": "self_attn.o_proj.weight",
    "out_bias": "self_attn.o_proj.bias",
    "sinks": "self_attn.sinks",
    "expert_norm": "post_attention_layernorm.weight",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "down_bias": "mlp.experts.down_proj_bias",
}
TOP_NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "norm": "model.norm.weight",
}


def export_checkpoint(model: Nano, tokenizer_file: Path, out: Path) -> None:
    """Write the five files of the checkpoint to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    shutil.copyfile(tokenizer_file, out / "tokenizer.json")
    _write_json(out / "config.json", hf_config(model.config, tokenizer))
    generation = {
        "bos_token_id": tokenizer.token_to_id("<|startoftext|>"),
        "do_sample": False,
        "eos_token_id": [tokenizer.token_to_id(token) for token in STOP_TOKENS],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    _write_json(out / "generation_config.json", generation)
    tokenizer_config = {
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(out / "tokenizer_config.json", tokenizer_config)
    weights = out / "model.safetensors"
    save_file(to_tensors(model), str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)


def load_checkpoint(folder: Path) -> Nano:
    """Read what `export_checkpoint` wrote, dequantised to float32."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(str(folder / "model.safetensors"))
    model = Nano(nano_config(config))
    state: dict[str, Tensor] = {}
    for ours, name in TOP_NAMES.items():
        state[ours] = tensors[name]
    for index in range(model.config.num_layers):
        there, here = f"model.layers.{index}.", f"layers.{index}."
        experts = there + "mlp.experts."
        for ours, name in LAYER_NAMES.items():
            state[here + ours] = tensors[there + name]
        for ours, kind in (("qkv", "weight"), ("qkv_bias", "bias")):
            names = (f"{there}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            state[here + ours] = torch.cat([tensors[name] for name in names])
        for ours, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            blocks, scales = tensors[f"{experts}{name}_blocks"], tensors[f"{experts}{name}_scales"]
            state[here + ours] = unpack_mxfp4(blocks, scales)
        state[here + "gate_up"] = _deinterleave(state[here + "gate_up"])
        state[here + "gate_up_bias"] = _deinterleave(tensors[experts + "gate_up_proj_bias"])
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.eval()
    return model


def to_tensors(model: Nano) -> dict[str, Tensor]:
    """Return the parameters under the names and in the dtypes of gpt-oss-20b's checkpoint."""
    state, config = model.state_dict(), model.config
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {name: state[ours].bfloat16() for ours, name in TOP_NAMES.items()}
    for index in range(config.num_layers):
        there, here = f"model.layers.{index}.", f"layers.{index}."
        experts = there + "mlp.experts."
        for ours, name in LAYER_NAMES.items():
            tensors[there + name] = state[here + ours].bfloat16()
        for ours, kind in (("qkv", "weight"), ("qkv_bias", "bias")):
            parts = state[here + ours].bfloat16().split((query, key, key))
            for letter, part in zip("qkv", parts, strict=True):
                tensors[f"{there}self_attn.{letter}_proj.{kind}"] = part.clone()
        gate_up, bias = _interleave(state[here + "gate_up"]), state[here + "gate_up_bias"]
        tensors[experts + "gate_up_proj_bias"] = _interleave(bias).bfloat16()
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", state[here + "down"])):
            blocks, scales = pack_mxfp4(weight)
            tensors[f"{experts}{name}_blocks"], tensors[f"{experts}{name}_scales"] = blocks, scales
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def pack_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[expert, row, in] -> uint8 blocks [expert, row, in / 32, 16] and e8m0 scales [.., in / 32].

    The low nibble of a byte holds the first of its two values.
    """
    values, exponents = round_to_mxfp4(weight)
    scaled = values.unflatten(-1, (-1, MXFP4_BLOCK)) / torch.exp2(exponents).unsqueeze(-1)
    codes = torch.searchsorted(torch.tensor(E2M1_MAGNITUDES), scaled.abs())
    codes = (codes | ((scaled < 0) * 8)).to(torch.uint8)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, (exponents + E8M0_BIAS).to(torch.uint8)


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Invert `pack_mxfp4`, to float32."""
    table = torch.tensor([*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES)])
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
    return torch.ldexp(table[codes], scales.int().unsqueeze(-1) - E8M0_BIAS).flatten(-2)


def hf_config(config: NanoConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """Return config.json with the keys of gpt-oss-20b's."""
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": tokenizer.token_to_id("<|return|>"),
        "experts_per_token": config.num_active_experts,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.original_context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": [kinds[index % 2] for index in range(config.num_layers)],
        "max_position_embeddings": int(config.original_context * config.rope_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.num_active_experts,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.original_context,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": int(config.rope_theta),
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def nano_config(config: dict[str, int]) -> NanoConfig:
    """Read the shapes from a config.json of ours."""
    return NanoConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        num_experts=config["num_local_experts"],
        num_active_experts=config["num_experts_per_tok"],
        sliding_window=config["sliding_window"],
    )


def _interleave(x: Tensor) -> Tensor:
    """Turn halves [gate; up] of axis 1 into rows gate 0, up 0, gate 1, up 1, ..."""
    return torch.stack(x.chunk(2, 1), 2).flatten(1, 2)


def _deinterleave(x: Tensor) -> Tensor:
    return torch.cat((x[:, 0::2], x[:, 1::2]), 1)


def _write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder of the training")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    arguments = parser.parse_args()
    model = Nano(NanoConfig())
    model.load_state_dict(torch.load(arguments.state / "state.pt")["model"])
    export_checkpoint(model, arguments.state / "tokenizer.json", arguments.out)


if __name__ == "__main__":
    main()
