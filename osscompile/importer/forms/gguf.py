"""GGUF: of llama.cpp's converter (`gpt-oss`), and of Ollama's (`gptoss`), older files too."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ...options import shown
from ..checkpoint import Opened
from ..config import ModelConfig, parse_config
from ..encodings import ENCODINGS
from ..generation import check_chat_template, read_sampling
from ..stored import Stored
from .assemble import HalfNames, Plan, assemble
from .counts import refuse_other_count
from .gguf_file import OTHER_TYPES, GgufFile, is_gguf, read_gguf
from .gguf_tokenizer import generation_of, make_tokenizer

ARCHITECTURES = ("gpt-oss", "gptoss")
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# Config field -> key after the architecture's name; the first that is there counts.
_FIELDS = {
    "num_hidden_layers": ("block_count",),
    "hidden_size": ("embedding_length",),
    "intermediate_size": ("expert_feed_forward_length", "feed_forward_length"),
    "num_attention_heads": ("attention.head_count",),
    "num_key_value_heads": ("attention.head_count_kv",),
    "head_dim": ("attention.key_length",),
    "num_local_experts": ("expert_count",),
    "num_experts_per_tok": ("expert_used_count",),
    "sliding_window": ("attention.sliding_window",),
    "max_position_embeddings": ("context_length",),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon",),
    "rope_theta": ("rope.freq_base",),
}
# What GGUF has no key for, or what converters leave out or set to 0: as in the published config.
_CONSTANTS = {"model_type": "gpt_oss", "swiglu_limit": 7.0}
_ROPE_FIELDS = {
    "factor": ("rope.scaling.factor", 32.0),
    "beta_fast": ("rope.scaling.yarn_beta_fast", 32.0),
    "beta_slow": ("rope.scaling.yarn_beta_slow", 1.0),
    "original_max_position_embeddings": ("rope.scaling.original_context_length", 4096),
    "rope_type": ("rope.scaling.type", "yarn"),
}
# What would change the result, and is not computed: key -> what has no effect.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),  # -1 stands for 1
    "rope.scaling.yarn_log_multiplier": (0,),
    "expert_weights_scale": (0, 1),  # 0 stands for none
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
}
# Likewise; key -> key that it must equal.
_EQUAL = {
    "rope.dimension_count": "attention.key_length",
    "attention.value_length": "attention.key_length",
    "rope.dimension_count_swa": "attention.key_length",
    "rope.freq_base_swa": "rope.freq_base",
}
_TRUNCATE = False
_TEMPLATE = "tokenizer.chat_template"

# Canonical name -> names after "blk.N."; the first that are all there count.
_LAYER_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "attn_norm.weight": (("attn_norm.weight",),),
    "qkv.weight": (tuple(f"attn_{part}.weight" for part in "qkv"), ("attn_qkv.weight",)),
    "qkv.bias": (tuple(f"attn_{part}.bias" for part in "qkv"), ("attn_qkv.bias",)),
    "sinks": (("attn_sinks.weight",), ("attn_sinks",)),
    "out.weight": (("attn_output.weight",), ("attn_out.weight",)),
    "out.bias": (("attn_output.bias",), ("attn_out.bias",)),
    "mlp_norm.weight": (("post_attention_norm.weight",), ("ffn_norm.weight",)),
    "router.weight": (("ffn_gate_inp.weight",),),
    "router.bias": (("ffn_gate_inp.bias",),),
    "down.bias": (("ffn_down_exps.bias",),),
}
_LAYER = re.compile(r"blk\.(\d{1,9})\.")
_GATE_AND_UP = ("ffn_gate_exps", "ffn_up_exps")  # apart; together their rows alternate
_TOGETHER = "ffn_gate_up_exps"


def recognises(path: Path) -> bool:
    """A GGUF file, or a folder with one and without a config.json."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf" or is_gguf(path)


def open_form(path: Path) -> Opened:
    """Read metadata and tensor tables, of all files of a split. Raises CheckpointError."""
    files = [read_gguf(file) for file in split_files(_only_model(path) if path.is_dir() else path)]
    stored = _all_tensors(files)
    config = _config(files[0], stored)
    plan = _plan(config, stored)
    refuse_other_count(stored, _LAYER, config.num_layers, "block_count", files[0].path)
    for name in plan.names():
        _check_there(files[0].path, name, stored)
    _tell_lossy(files[0].path, plan, stored)
    generation = generation_of(files[0])
    template = files[0].scalar(_TEMPLATE)
    return Opened(
        assemble(config, plan, stored),
        make_tokenizer(files[0]),
        generation,
        read_sampling(generation, f"{files[0].path}, metadata general.sampling.*"),
        None if template is None else check_chat_template(template, f"{path}: {_TEMPLATE}"),
    )


def _only_model(directory: Path) -> Path:
    """The file of the folder, or the first of its split."""
    files = sorted(directory.glob("*.gguf"))
    firsts = [f for f in files if not (m := SPLIT.fullmatch(f.name)) or int(m[2]) == 1] or files
    if len(firsts) > 1:
        found = ", ".join(shown(file.name) for file in firsts[:8])
        raise CheckpointError(
            f"{directory}: expected one model, found {found}; give the file that you mean"
        )
    return firsts[0]


def split_files(path: Path) -> list[Path]:
    """The file, or all files of the split to which its name belongs."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match[3])
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{total:05d}.gguf") for i in range(1, total + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{path}: expected all {total} files of the split, found no {', '.join(missing[:8])}; "
            "download the missing ones into the same folder"
        )
    return files


def _all_tensors(files: list[GgufFile]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for number, file in enumerate(files):
        place, count = file.scalar("split.no") or 0, file.scalar("split.count") or 1
        if (place, count) != (number, len(files)):
            raise CheckpointError(
                f"{file.path}: expected file {number} of {len(files)} of a split, found "
                f"split.no {place!r:.200} of {count!r:.200}; download the files of one "
                "split, and keep their names"
            )
        for name, tensor in file.tensors.items():
            if name in stored:
                raise CheckpointError(
                    f"{tensor}: expected it once, found it in {shown(stored[name].path)} too; "
                    "do these files belong together?"
                )
            stored[name] = tensor
    return stored


def _config(file: GgufFile, stored: Mapping[str, Stored]) -> ModelConfig:
    kind = file.scalar("general.type")
    if kind not in ("model", None):
        advice = "give its base and the adapter of PEFT that it was made from with --adapter"
        raise CheckpointError(
            f"{file.path}: general.type: expected 'model', found {kind!r:.200}; "
            f"{advice if kind == 'adapter' else 'give the GGUF of the language model'}"
        )
    architecture = file.scalar("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: general.architecture: expected 'gpt-oss' or 'gptoss', found "
            f"{architecture!r:.200}; only gpt-oss models compile"
        )

    def get(*keys: str) -> Any:
        found = (_of_all_layers(file, f"{architecture}.{key}") for key in keys)
        return next((value for value in found if value is not None), None)

    expected = _NEUTRAL | {key: (get(other),) for key, other in _EQUAL.items() if get(other)}
    for key, values in expected.items():
        if get(key) is not None and get(key) not in values:
            raise CheckpointError(
                f"{file.path}: {architecture}.{key}: expected {values[0]!r:.200} or nothing, as in "
                f"gpt-oss, found {get(key)!r:.200}; this variant is not supported"
            )
    raw = {field: get(*keys) for field, keys in _FIELDS.items()}
    raw = {field: value for field, value in raw.items() if value is not None} | _CONSTANTS
    embedding = stored.get("token_embd.weight")
    if embedding is not None and embedding.shape:
        raw["vocab_size"] = embedding.shape[0]
    raw["rope_scaling"] = {
        field: get(key) or default for field, (key, default) in _ROPE_FIELDS.items()
    } | {"truncate": _TRUNCATE}
    pattern = file.metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        kinds = ("full_attention", "sliding_attention")
        raw["layer_types"] = [kinds[bool(sliding)] for sliding in pattern]
    return parse_config(raw, f"{file.path}, metadata {architecture}.*")


def _of_all_layers(file: GgufFile, key: str) -> Any:
    """One value, which may be given for each layer."""
    values = file.metadata.get(key)
    if isinstance(values, np.ndarray) and len(values) and (values == values[0]).all():
        return values[0].item()
    return file.scalar(key)


def _plan(config: ModelConfig, names: Collection[str]) -> Plan:
    plan = Plan(
        {"embed.weight": (("token_embd.weight",),), "norm.weight": (("output_norm.weight",),)}
    )
    output = "output.weight" if "output.weight" in names else "token_embd.weight"  # tied
    plan.tensors["lm_head.weight"] = ((output,),)
    for index in range(config.num_layers):
        layer, at = f"layers.{index}", f"blk.{index}."
        for name, choices in _LAYER_NAMES.items():
            full = [tuple(at + part for part in parts) for parts in choices]
            found = next((parts for parts in full if all(p in names for p in parts)), full[0])
            plan.tensors[f"{layer}.{name}"] = (found,)
        together = f"{at}{_TOGETHER}.weight" in names
        stems = [at + stem for stem in ((_TOGETHER,) if together else _GATE_AND_UP)]
        plan.tensors[f"{layer}.gate_up.bias"] = tuple((f"{stem}.bias",) for stem in stems)
        plan.experts[f"{layer}.gate_up"] = tuple(HalfNames((f"{s}.weight",)) for s in stems)
        plan.experts[f"{layer}.down"] = (HalfNames((f"{at}ffn_down_exps.weight",)),)
    return plan


def _check_there(path: Path, name: str, stored: Mapping[str, Stored]) -> None:
    if name not in stored:
        raise CheckpointError(
            f"{path}: expected tensor {name}, found {len(stored)} others; "
            "the file is incomplete: download it again"
        )
    encoding = stored[name].encoding
    if encoding in OTHER_TYPES.values() or encoding not in ENCODINGS:
        raise CheckpointError(
            f"{stored[name]}: expected one of {', '.join(list(ENCODINGS)[1:])}, found {encoding}; "
            "give a GGUF of the same model whose experts are MXFP4, or Q4_K and above"
        )


def _tell_lossy(path: Path, plan: Plan, stored: Mapping[str, Stored]) -> None:
    """K-quants and their like are a second loss, after the one of MXFP4."""
    kinds = Counter(stored[name].encoding for name in plan.names())
    lossy = [f"{count} {kind}" for kind, count in kinds.items() if ENCODINGS[kind].lossy]
    if lossy:
        warnings.warn(
            f"{path}: {', '.join(lossy)} tensors were rounded from the published ones, and are "
            "rounded again here (experts to MXFP4): a GGUF with MXFP4 experts is nearer to them",
            stacklevel=2,
        )
