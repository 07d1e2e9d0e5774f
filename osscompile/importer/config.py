"""Read the config.json of a gpt-oss checkpoint: Hugging Face's spellings in, checked facts out."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MXFP4_BLOCK = 32  # consecutive inputs that share one scale
HEAD_DIM_UNIT = 8  # attention mixes values in parts of so many dimensions

# Far above any real model, low enough that a nonsense config cannot exhaust memory.
MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
MAX_NUMBER = 1e12
MAX_FOUND = 200  # letters of a value in a message

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding with YaRN (model as in arXiv:2309.00071).

    `truncate` rounds the ends of the YaRN ramp to whole dimensions; gpt-oss ships with false.
    """

    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    truncate: bool


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one gpt-oss model. `sliding[i]`: layer i sees only the last `window` keys."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_token: int
    window: int
    sliding: tuple[bool, ...]
    max_context: int
    norm_eps: float
    swiglu_limit: float
    rope: RopeConfig

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: queries, then keys, then values."""
        return self.q_size + 2 * self.kv_size

    @property
    def heads_per_kv_head(self) -> int:
        """Query head h reads key/value head h // heads_per_kv_head."""
        return self.num_heads // self.num_kv_heads

    @property
    def hidden_blocks(self) -> int:
        """MXFP4 blocks in one row of the gate/up weights."""
        return self.hidden_size // MXFP4_BLOCK

    @property
    def intermediate_blocks(self) -> int:
        """MXFP4 blocks in one row of the down weights."""
        return self.intermediate_size // MXFP4_BLOCK


def read_config(directory: str | Path) -> ModelConfig:
    """Read `directory`/config.json. Raises CheckpointError if it is absent or not a gpt-oss."""
    path = Path(directory) / "config.json"
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Check a config as Hugging Face transformers 4 or 5 writes it; `source` names it in errors.

    Absent `layer_types` means alternating layers, sliding first; absent `truncate` means true: the
    defaults of transformers. Raises CheckpointError for another architecture, a missing key or a
    value that no gpt-oss has.
    """
    fields = _Fields(raw, source)
    _check_architecture(fields)
    num_layers = fields.size("num_hidden_layers", maximum=MAX_LAYERS)
    sliding = _parse_layer_types(fields, num_layers)
    max_context = fields.size("max_position_embeddings")
    without_window = not any(sliding) and fields.raw.get("sliding_window") is None
    config = ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=fields.size("num_attention_heads"),
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        num_experts=fields.size("num_local_experts", "num_experts"),
        num_experts_per_token=fields.size("num_experts_per_tok", "experts_per_token"),
        window=max_context if without_window else fields.size("sliding_window"),
        sliding=sliding,
        max_context=max_context,
        norm_eps=fields.positive("rms_norm_eps"),
        swiglu_limit=fields.positive("swiglu_limit"),
        rope=_parse_rope(fields),
    )
    _check_sizes(fields, config)
    return config


def has_file(path: Path) -> bool:
    """Whether a file that may be left out is there. Raises CheckpointError for something else of
    its name: a folder, a link to nothing, a git-lfs pointer."""
    if not os.path.lexists(path):
        return False
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path}: expected a file or nothing, found "
            f"{'something else' if os.path.exists(path) else 'a link to a file that is gone'}; "
            "download it again, or remove it to compile without"
        )
    refuse_pointer(path)
    return True


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if the file is what git leaves where git-lfs is not installed, or
    nothing that can be read to its end, such as a pipe."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path}: expected a file, found something else; download it again")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError:
        return  # who reads it tells
    if start == LFS_POINTER:
        raise CheckpointError(
            f"{path}: expected the file itself, found a git-lfs pointer to it; run `git lfs pull` "
            "in its folder, or download it with `hf download`"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError naming the file if that is not what it holds."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found; expected a directory with a Hugging Face checkpoint "
            "(config.json, tokenizer.json, *.safetensors)"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, JSON nested too deeply
        raise CheckpointError(f"{path}: not JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class _Fields:
    """Checked access to the keys of one JSON object."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def error(self, key: str, expected: str, advice: str = "") -> CheckpointError:
        found = repr(self.raw[key]) if key in self.raw else "nothing"
        found = found if len(found) <= MAX_FOUND else f"{found[:MAX_FOUND]}.."
        message = f"{self.source}: {key}: expected {expected}, found {found}"
        return CheckpointError(message + (f"; {advice}" if advice else ""))

    def size(self, key: str, other_spelling: str | None = None, maximum: int = MAX_SIZE) -> int:
        other = None if other_spelling is None else self.raw.get(other_spelling)
        if self.raw.get(key) is None and other_spelling is not None and other is not None:
            key = other_spelling
        value = self.raw.get(key)
        if type(value) is not int or not 1 <= value <= maximum:
            raise self.error(key, f"a whole number from 1 to {maximum}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value: Any = self.raw.get(key, default)
        if type(value) not in (int, float) or not 0 < value < MAX_NUMBER:
            raise self.error(key, f"a positive number below {MAX_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def constant(self, key: str, value: object) -> None:
        """An absent key is fine; another value would be a model that we do not compute."""
        if self.raw.get(key, value) != value:
            raise self.error(key, f"{value!r} as in gpt-oss", "this variant is not supported")


def _check_architecture(fields: _Fields) -> None:
    if fields.raw.get("model_type") != "gpt_oss":
        raise fields.error("model_type", "'gpt_oss'", "only gpt-oss models compile")
    fields.constant("attention_bias", True)
    fields.constant("hidden_act", "silu")
    fields.flag("tie_word_embeddings", default=False)
    _check_rotary(fields)
    _check_head(fields)


def _check_rotary(fields: _Fields) -> None:
    """Every dimension of a head is rotated."""
    if fields.raw.get("partial_rotary_factor") is not None:
        fields.constant("partial_rotary_factor", 1.0)


def _check_head(fields: _Fields) -> None:
    """Refuse models that answer with something else than a next token."""
    architectures = fields.raw.get("architectures") or []
    if not isinstance(architectures, list) or any(not isinstance(a, str) for a in architectures):
        raise fields.error("architectures", "a list of names")
    if architectures and not {"GptOssForCausalLM", "GptOssModel"} & set(architectures):
        raise fields.error(
            "architectures",
            "GptOssForCausalLM",
            "a classifier or reward model predicts no next token: only language models compile",
        )


def _parse_layer_types(fields: _Fields, num_layers: int) -> tuple[bool, ...]:
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        return tuple(layer % 2 == 0 for layer in range(num_layers))
    known = ("sliding_attention", "full_attention")
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(kind not in known for kind in kinds)
    ):
        raise fields.error(
            "layer_types", f"{num_layers} names (num_hidden_layers), each {' or '.join(known)}"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def _parse_rope(fields: _Fields) -> RopeConfig:
    # transformers 5 writes everything, theta included, into rope_parameters.
    key = "rope_parameters" if fields.raw.get("rope_parameters") is not None else "rope_scaling"
    raw = fields.raw.get(key)
    if not isinstance(raw, dict):
        raise fields.error(key, "an object with the YaRN parameters")
    defaults = {
        "rope_type": raw.get("type"),  # the spelling before transformers 4.43
        "rope_theta": fields.raw.get("rope_theta"),
        "original_max_position_embeddings": fields.raw.get("initial_context_length"),
    }
    present = {name: value for name, value in defaults.items() if value is not None}
    rope = _Fields(present | raw, f"{fields.source}: {key}")
    if rope.raw.get("rope_type") != "yarn":
        raise rope.error("rope_type", "'yarn' as in gpt-oss", "other kinds are not supported")
    _check_rotary(rope)
    for override in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.raw.get(override) is not None:
            raise rope.error(override, "nothing (0.1 ln factor + 1)", "it is not supported")
    return RopeConfig(
        theta=rope.positive("rope_theta"),
        factor=rope.positive("factor"),
        beta_fast=rope.positive("beta_fast", default=32.0),
        beta_slow=rope.positive("beta_slow", default=1.0),
        original_context=rope.size("original_max_position_embeddings"),
        truncate=rope.flag("truncate", default=True),
    )


def _check_sizes(fields: _Fields, config: ModelConfig) -> None:
    for key in ("hidden_size", "intermediate_size"):
        if fields.raw[key] % MXFP4_BLOCK:
            raise fields.error(key, f"a multiple of {MXFP4_BLOCK}, the MXFP4 block")
    if config.head_dim % HEAD_DIM_UNIT:
        raise fields.error("head_dim", f"a multiple of {HEAD_DIM_UNIT}, as vectors hold them")
    if config.q_size % MXFP4_BLOCK:
        raise fields.error(
            "head_dim", f"num_attention_heads x head_dim to be a multiple of {MXFP4_BLOCK}"
        )
    if config.num_heads % config.num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"a divisor of num_attention_heads = {config.num_heads}"
        )
    if config.num_experts_per_token > config.num_experts:
        key = "num_experts_per_tok"
        key = key if fields.raw.get(key) is not None else "experts_per_token"
        raise fields.error(key, f"at most the number of experts, {config.num_experts}")
    if config.rope.factor < 1 or config.rope.theta <= 1:
        raise CheckpointError(
            f"{fields.source}: rope: expected theta > 1 and factor >= 1, found "
            f"theta {config.rope.theta} and factor {config.rope.factor}"
        )
    if config.rope.beta_fast <= config.rope.beta_slow:
        raise CheckpointError(
            f"{fields.source}: rope: expected beta_fast > beta_slow, found "
            f"{config.rope.beta_fast} and {config.rope.beta_slow}"
        )
