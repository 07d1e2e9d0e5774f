"""The form of Hugging Face transformers: MXFP4 as published, or bf16, fp16 and fp32 fine-tunes."""

import re
from collections.abc import Collection
from pathlib import Path

from ...errors import CheckpointError
from ...options import shown
from ..checkpoint import Opened
from ..config import ModelConfig, has_file, parse_config, read_json_object
from ..generation import GENERATION, read_chat_template, read_eos, read_generation
from .assemble import HalfNames, Plan, assemble
from .counts import refuse_other_count
from .foreign import (
    refuse_foreign_config,
    refuse_foreign_files,
    refuse_foreign_names,
    refuse_foreign_types,
    refuse_unknown_wrapper,
)
from .shards import INDEX, open_shards, read_index

# Canonical name -> Hugging Face names, one below the other.
_MODEL_NAMES = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
_LAYER_NAMES = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "qkv.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "sinks": ("self_attn.sinks",),
    "out.weight": ("self_attn.o_proj.weight",),
    "out.bias": ("self_attn.o_proj.bias",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
}
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(?:gate_up_projs|down_projs)\.(\d{1,9})\.")
# What wrappers put before the names of the model that they hold.
_WRAPPERS = re.compile(r"(?:base_model\.model\.|module\.)+")
# What they put between them too.
_INNER_WRAPPERS = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_TEXT_MODELS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def recognises(path: Path) -> bool:
    """Any folder that no other form has taken."""
    return path.is_dir()


def open_form(path: Path) -> Opened:
    """Read config.json, the index and the headers of the shards, no weights.

    Raises CheckpointError naming the file, field or tensor at fault.
    """
    config, tied = _read_config(path)
    index = read_index(path)
    if index is None:
        stored = open_shards(path)
        names = _plain_names(stored, path)
        plan = plan_names(config, tied, names, path)
    else:  # what is missing is told before any shard is looked at
        names = _plain_names(index, path / INDEX)
        plan = plan_names(config, tied, names, path / INDEX)
        stored = open_shards(path, {names[name] for name in plan.names()})
    refuse_foreign_types(stored.values())
    renamed = {name: stored[names[name]] for name in plan.names()}
    tokenizer = path / "tokenizer.json"
    return Opened(
        assemble(config, plan, renamed),
        tokenizer if has_file(tokenizer) else None,
        *read_generation(path),
        read_chat_template(path),
    )


def check_metadata(directory: Path) -> ModelConfig:
    """Check what can be checked without the weights: the other files. Returns the model's shape.

    Raises CheckpointError. A download can stop here before it fetches gigabytes of another model.
    """
    config, tied = _read_config(directory)
    index = read_index(directory)
    if index is not None:
        plan_names(config, tied, _plain_names(index, directory / INDEX), directory / INDEX)
    generation, _ = read_generation(directory)
    read_eos(generation, config.vocab_size, str(directory / GENERATION))
    read_chat_template(directory)
    return config


def plan_names(config: ModelConfig, tied: bool, names: Collection[str], where: Path) -> Plan:
    """Which names hold what; CheckpointError, naming the first, if some are missing from `names`.

    `tied`: the embedding is the output layer too.
    """
    plan = Plan()
    plan.tensors |= {name: (stored,) for name, stored in _MODEL_NAMES.items()}
    if tied:
        plan.tensors["lm_head.weight"] = plan.tensors["embed.weight"]
    for index in range(config.num_layers):
        at = f"model.layers.{index}."
        for name, stored in _LAYER_NAMES.items():
            plan.tensors[f"layers.{index}.{name}"] = (tuple(at + part for part in stored),)
        _plan_mlp(plan, config, f"layers.{index}", f"{at}mlp.", names)
    refuse_foreign_names(names, where)
    refuse_other_count(names, _LAYER, config.num_layers, "num_hidden_layers", where)
    refuse_other_count(names, _EXPERT, config.num_experts, "num_local_experts", where)
    for name in plan.names():
        if name not in names:
            refuse_unknown_wrapper(names, where)
            raise CheckpointError(
                f"{where}: expected tensor {name}, found {len(names)} others; "
                "the checkpoint is incomplete: download it again"
            )
    _refuse_two_kinds(names, where)
    return plan


def _refuse_two_kinds(names: Collection[str], where: Path) -> None:
    """Experts that are there twice, of which one kind may be left over."""
    for name in names:
        stem = name.removesuffix("_blocks")
        each = f"{stem}s.0.weight"
        twins = [twin for twin in (stem, f"{stem}_blocks", each) if twin in names]
        if stem.endswith(("gate_up_proj", "down_proj")) and len(twins) > 1:
            found = " and ".join(map(shown, twins))
            raise CheckpointError(
                f"{where}: expected the experts in one form, found {found}; save the checkpoint "
                "again with one of them"
            )


def _plan_mlp(plan: Plan, config: ModelConfig, layer: str, at: str, names: Collection[str]) -> None:
    """Router and experts. How experts are stored is told by their names, never by a shape: down is
    square in the published models."""
    router = f"{at}router.linear." if f"{at}router.linear.weight" in names else f"{at}router."
    for kind in ("weight", "bias"):
        plan.tensors[f"{layer}.router.{kind}"] = ((router + kind,),)
    for part in ("gate_up", "down"):
        stem = f"{at}experts.{part}_proj"
        if f"{stem}s.0.weight" in names:  # a module an expert: [rows, inputs]
            plan.by_expert = True
            experts = range(config.num_experts)
            weights = HalfNames(tuple(f"{stem}s.{e}.weight" for e in experts))
            plan.tensors[f"{layer}.{part}.bias"] = (tuple(f"{stem}s.{e}.bias" for e in experts),)
        else:
            plan.tensors[f"{layer}.{part}.bias"] = ((f"{stem}_bias",),)
            if stem in names:
                weights = HalfNames((stem,), transposed=True)
            elif f"{stem}_blocks" in names and f"{stem}_scales" not in names:
                # transformers 5 saves a dequantised model under the name of the blocks
                weights = HalfNames((f"{stem}_blocks",), transposed=True)
            else:
                weights = HalfNames((f"{stem}_blocks",), f"{stem}_scales")
        plan.experts[f"{layer}.{part}"] = (weights,)


def _read_config(directory: Path) -> tuple[ModelConfig, bool]:
    """The config, and whether embedding and output layer are tied."""
    path = directory / "config.json"
    raw = read_json_object(path)
    text = raw.get("text_config")
    if isinstance(text, dict) and text.get("model_type") == "gpt_oss":
        raw = text
    refuse_foreign_config(raw, path)
    refuse_foreign_files(directory)
    return parse_config(raw, str(path)), raw.get("tie_word_embeddings") is True


def _plain_names(stored: Collection[str], where: Path) -> dict[str, str]:
    """Names as transformers gives them -> names as they are stored, in which wrappers show."""
    plain: dict[str, str] = {}
    for name in stored:
        bare = _INNER_WRAPPERS.sub("", name)
        wrapper = _WRAPPERS.match(bare)
        bare = bare[wrapper.end() :] if wrapper is not None else bare
        for wrapped, short in _TEXT_MODELS:
            if bare.startswith(wrapped):
                bare = short + bare.removeprefix(wrapped)
        if bare in plain:
            raise CheckpointError(
                f"{where}: expected every tensor once, found {shown(plain[bare])} and "
                f"{shown(name)}; "
                "save the checkpoint again without the wrapper around the model"
            )
        plain[bare] = name
    return plain
