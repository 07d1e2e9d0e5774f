"""Merge PEFT's LoRA adapters into a checkpoint while it is read: into attention, router, output
layer and experts. DoRA scales the rows of what is merged; whole modules are replaced."""

import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ...errors import CheckpointError
from ...options import shown
from ...runtime.safetensors import FormatError, read_header
from ..checkpoint import Opened
from ..config import ModelConfig, read_json_object, refuse_pointer
from ..encodings import ENCODINGS
from ..stored import MAX_FAULT, Rows, Stored
from .adapter_config import Scaling, check_fields
from .assemble import FormSource
from .shards import INDEX

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# What PEFT, and the model around a language model, put into names.
PREFIXES = (("base_model.model.", ""), ("model.language_model.", "model."))
SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
LORA_KEY = re.compile(
    r"(?P<module>.*)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj")
ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.router(?:\.linear)?")
EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts(?:\.base_layer)?")
ONE_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_projs\.(\d+)")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")

# Modules that may be replaced as a whole: Hugging Face name -> canonical name.
WHOLE = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
WHOLE_OF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.router.weight": "router.weight",
    "mlp.router.bias": "router.bias",
    "mlp.router.linear.weight": "router.weight",
    "mlp.router.linear.bias": "router.bias",
    "self_attn.o_proj.weight": "out.weight",
    "self_attn.o_proj.bias": "out.bias",
}
# PEFT copies what it trains as a whole, so that these part, unless it is told to keep them tied.
TIED = ("embed.weight", "lm_head.weight")


@dataclass
class Lora:
    """The tensors of one module, by the ends of their names."""

    parts: dict[str, Stored] = field(default_factory=dict)

    def read(self, part: str) -> np.ndarray:
        """Float32."""
        stored = self.parts[part]
        return stored.numbers(0, stored.shape[0]).astype(np.float32)


@dataclass(frozen=True)
class LowRank:
    """Rows [first, first + len(b)) of a matrix gain b a; then, in DoRA, each row is stretched to
    its magnitude."""

    first: int
    b: np.ndarray
    a: np.ndarray
    magnitude: np.ndarray | None

    def __call__(self, rows: np.ndarray, start: int) -> None:
        """Change rows [n, inputs] float32 in place; `start` is the place of the first."""
        begin = max(start, self.first)
        end = min(start + len(rows), self.first + len(self.b))
        if begin >= end:
            return
        own = slice(begin - self.first, end - self.first)
        part = rows[begin - start : end - start]
        part += self.b[own] @ self.a
        if self.magnitude is not None:
            norm = np.sqrt(np.einsum("ij,ij->i", part, part))
            part *= (self.magnitude[own] / np.maximum(norm, np.finfo(np.float32).tiny))[:, None]


def recognises(path: Path) -> bool:
    """A folder with an adapter and no model; training code may put the base's config beside it."""
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    has_model = (path / INDEX).exists() or any(path.glob("model*.safetensors"))
    return not (has_model and (path / "config.json").exists())


def open_form(path: Path) -> Opened:
    """Tell what it is, by a CheckpointError: an adapter alone is no model."""
    base = read_json_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = shlex.quote(base) if isinstance(base, str) and base.isprintable() and base else "BASE"
    folder = shlex.quote(str(path))
    raise CheckpointError(
        f"{path}: expected a model, found an adapter for {base:.200}; merge it while you compile: "
        f"osscompile compile {base:.200} --adapter {folder}"
    )


def merge_adapter(source: FormSource, directory: Path) -> None:
    """Have every read of the source give the merged weights; adapters merge in order.

    Raises CheckpointError naming the field or tensor of what cannot be merged.
    """
    config_path = directory / ADAPTER_CONFIG
    if not config_path.is_file():
        raise CheckpointError(
            f"{directory}: expected a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as PEFT "
            f"saves adapters, found no {ADAPTER_CONFIG}"
        )
    raw = read_json_object(config_path)
    check_fields(raw, config_path)
    scaling = Scaling.of(raw, config_path)
    modules: dict[str, Lora] = {}
    whole: dict[str, Stored] = {}
    names: list[str] = []
    for key, stored in _open_weights(directory).items():
        name = _plain_name(key)
        match = LORA_KEY.fullmatch(name)
        if match is not None:
            kept, place = modules.setdefault(match["module"], Lora()).parts, match["part"]
        else:
            kept, place = whole, _canonical(source, name, stored)
            names.append(name)
        if place in kept:
            _refuse_tensor(stored, f"it once, but {shown(kept[place].name)} is the same")
        kept[place] = stored
    _check_there(raw, config_path, names, modules)
    embedding, output = (source.tensors[name] for name in TIED)
    if raw.get("ensure_weight_tying") is True and embedding == output:
        whole |= {name: stored for name in TIED for known, stored in whole.items() if known in TIED}
    for name, stored in whole.items():  # first: of one adapter, the products come on top
        source.replace(name, Rows((stored,)))
    one_expert: dict[tuple[int, str], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for module, lora in modules.items():
        _merge_module(source, module, lora, scaling, one_expert)
    for (layer, part), of_expert in one_expert.items():
        source.experts[f"layers.{layer}.{part}"].add(_by_expert(source, layer, part, of_expert))


def _open_weights(directory: Path) -> dict[str, Stored]:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file, but {ADAPTER_CONFIG} is there; save the adapter with "
            "`save_pretrained()`, which writes it"
        )
    refuse_pointer(path)
    try:
        header = read_header(path)
    except FormatError as error:
        raise CheckpointError(f"{shown(str(error), MAX_FAULT)}; download the file again") from error
    for name, entry in header.items():
        if entry.dtype not in ENCODINGS or entry.dtype == "U8" or not entry.shape:
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: expected BF16, F16 or F32, found {entry.dtype}"
            )
    return {n: Stored(path, n, e.dtype, e.shape, e.offset) for n, e in header.items()}


def _plain_name(key: str) -> str:
    """As transformers names the module."""
    for prefix, plain in PREFIXES:
        if key.startswith(prefix):
            key = plain + key.removeprefix(prefix)
    return SAVED.sub("", key, count=1)


def _check_there(
    raw: dict[str, Any], path: Path, names: Collection[str], modules: dict[str, Lora]
) -> None:
    """Refuse an adapter that lacks what its config says; `names` are those of whole tensors."""
    if not names and not modules:
        raise CheckpointError(
            f"{path.with_name(ADAPTER_WEIGHTS)}: expected the tensors of an adapter, found none; "
            "save it again with `save_pretrained()`"
        )
    saved = raw.get("modules_to_save") or []
    if raw.get("ensure_weight_tying") is True:  # one of two may stand for both
        saved = []
    for module in saved if isinstance(saved, list) else [saved]:
        if not any(f".{module}." in f".{name}" for name in names):
            raise CheckpointError(
                f"{path}: modules_to_save: expected tensors of {module!r:.200} in "
                f"{ADAPTER_WEIGHTS}, found none; save the adapter again with `save_pretrained()`"
            )
    for lora in modules.values():
        if raw.get("use_dora") is True and "lora_magnitude_vector" not in lora.parts:
            any_part = next(iter(lora.parts.values()))
            _refuse_tensor(any_part, "its lora_magnitude_vector too, as use_dora is true")


def _canonical(source: FormSource, name: str, stored: Stored) -> str:
    """The tensor that a module which was trained as a whole (`modules_to_save`) replaces."""
    match = LAYER.fullmatch(name)
    canonical = WHOLE.get(name)
    if match is not None and match[2] in WHOLE_OF_LAYER:
        canonical = f"layers.{match[1]}.{WHOLE_OF_LAYER[match[2]]}"
    if canonical is None or canonical not in source.tensors:
        _refuse_tensor(stored, "of whole modules embed_tokens, lm_head, norm, router or o_proj")
    if stored.shape != source.shape(canonical):
        _refuse_tensor(stored, f"{list(source.shape(canonical))}, as the model has")
    return canonical


def _merge_module(
    source: FormSource,
    module: str,
    lora: Lora,
    scaling: Scaling,
    one_expert: dict[tuple[int, str], dict[int, tuple[np.ndarray, np.ndarray]]],
) -> None:
    config = source.config
    any_part = next(iter(lora.parts.values()))
    if not {"lora_A", "lora_B"} <= lora.parts.keys():
        _refuse_tensor(any_part, "lora_A and lora_B of the same module beside it")
    for match, merge in (
        (ATTENTION.fullmatch(module), _merge_attention),
        (ROUTER.fullmatch(module), _merge_router),
        (re.fullmatch("lm_head", module), _merge_output),
    ):
        if match is not None:
            name, first, rows, inputs = merge(config, match)
            if name not in source.tensors:
                _refuse_tensor(any_part, f"a layer below {config.num_layers}")
            source.edit(name, _low_rank(lora, module, scaling, first, (rows, inputs)))
            return
    if "lora_magnitude_vector" in lora.parts:
        _refuse_tensor(lora.parts["lora_magnitude_vector"], "DoRA on attention, router or lm_head")
    expert = ONE_EXPERT.fullmatch(module)
    if expert is not None:
        layer, part, index = int(expert[1]), expert[2], int(expert[3])
        shape = _expert_shape(config, part)
        delta = _low_rank(lora, module, scaling, 0, shape)
        if layer >= config.num_layers or index >= config.num_experts:
            _refuse_tensor(any_part, f"experts below {config.num_experts} of known layers")
        one_expert.setdefault((layer, part), {})[index] = (delta.b, delta.a)
        return
    all_experts = EXPERTS.fullmatch(module)
    if all_experts is None or int(all_experts[1]) >= config.num_layers:
        _refuse_tensor(any_part, "attention, router, experts or lm_head of a gpt-oss")
    _merge_experts(source, int(all_experts[1]), module, lora, scaling)


def _merge_attention(config: ModelConfig, match: re.Match[str]) -> tuple[str, int, int, int]:
    """Canonical name, first row, rows, inputs."""
    q, kv = config.q_size, config.kv_size
    if match[2] == "o":
        return f"layers.{int(match[1])}.out.weight", 0, config.hidden_size, q
    first, rows = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[match[2]]
    return f"layers.{int(match[1])}.qkv.weight", first, rows, config.hidden_size


def _merge_router(config: ModelConfig, match: re.Match[str]) -> tuple[str, int, int, int]:
    return f"layers.{int(match[1])}.router.weight", 0, config.num_experts, config.hidden_size


def _merge_output(config: ModelConfig, _: re.Match[str]) -> tuple[str, int, int, int]:
    return "lm_head.weight", 0, config.vocab_size, config.hidden_size


def _low_rank(
    lora: Lora, module: str, scaling: Scaling, first: int, shape: tuple[int, int]
) -> LowRank:
    """`shape`: rows and inputs of the matrix."""
    a, b = lora.parts["lora_A"], lora.parts["lora_B"]
    rank = a.shape[0]
    if rank < 1 or a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
        _refuse_tensor(a, f"[rank, {shape[1]}], and lora_B [{shape[0]}, rank], not {list(b.shape)}")
    magnitude = None
    if "lora_magnitude_vector" in lora.parts:
        magnitude = lora.read("lora_magnitude_vector").reshape(-1)
        if magnitude.shape != shape[:1]:
            _refuse_tensor(lora.parts["lora_magnitude_vector"], f"[{shape[0]}]")
    return LowRank(
        first,
        lora.read("lora_B") * np.float32(scaling(module, rank)),
        lora.read("lora_A"),
        magnitude,
    )


def _expert_shape(config: ModelConfig, part: str) -> tuple[int, int]:
    """Rows, of which gates and ups take turns, and inputs."""
    if part == "gate_up":
        return 2 * config.intermediate_size, config.hidden_size
    return config.hidden_size, config.intermediate_size


def _merge_experts(
    source: FormSource, layer: int, module: str, lora: Lora, scaling: Scaling
) -> None:
    """All experts in two tensors: A [experts * rank, inputs], expert by expert, and B [rows, rank *
    experts], in which the expert changes fastest. PEFT gives the name of one of the two matrices to
    either, so that the sizes tell: rows and inputs never both agree."""
    config = source.config
    num_experts = config.num_experts
    a, b = lora.parts["lora_A"], lora.parts["lora_B"]
    rank = a.shape[0] // num_experts
    for part in ("gate_up", "down"):
        rows, inputs = _expert_shape(config, part)
        if (
            rank
            and a.shape == (num_experts * rank, inputs)
            and b.shape == (rows, rank * num_experts)
        ):
            break
    else:
        wanted = f"[{num_experts} * rank, inputs], and lora_B [rows, rank * {num_experts}]"
        _refuse_tensor(a, f"{wanted} of gate_up_proj or down_proj, not {list(b.shape)}")
    parent = module.removesuffix(".base_layer")
    scale = np.float32(scaling(f"{parent}.{part}_proj", rank))
    a_of = lora.read("lora_A").reshape(num_experts, rank, inputs)
    b_of = lora.read("lora_B").reshape(rows, rank, num_experts) * scale
    halves = len(source.experts[f"layers.{layer}.{part}"].halves)

    def delta(expert: int, half: int) -> tuple[np.ndarray, np.ndarray]:
        return np.ascontiguousarray(b_of[half::halves, :, expert]), a_of[expert]

    source.experts[f"layers.{layer}.{part}"].add(delta)


def _by_expert(
    source: FormSource, layer: int, part: str, of_expert: dict[int, tuple[np.ndarray, np.ndarray]]
) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
    """Experts that are modules of their own; those without an adapter gain nothing."""
    halves = len(source.experts[f"layers.{layer}.{part}"].halves)
    rows, inputs = _expert_shape(source.config, part)
    nothing = np.zeros((rows, 1), np.float32), np.zeros((1, inputs), np.float32)

    def delta(expert: int, half: int) -> tuple[np.ndarray, np.ndarray]:
        b, a = of_expert.get(expert, nothing)
        return b[half::halves], a

    return delta


def _refuse_tensor(stored: Stored, expected: str) -> NoReturn:
    raise CheckpointError(
        f"{stored}: expected {expected}; found {list(stored.shape)}: merge this adapter with "
        "PEFT's `merge_and_unload()`, and compile the model that it saves"
    )
