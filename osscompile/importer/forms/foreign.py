"""Tell what a checkpoint is that we do not read, and what to give instead."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...options import shown
from ..config import has_file, read_json_object
from ..stored import Stored

READ = "osscompile reads MXFP4, bf16, fp16, fp32 and GGUF"
GIVE = "give the checkpoint that it was made from"

# quant_method of config.json -> what the world calls it.
QUANTISATIONS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "modelopt": "NVIDIA ModelOpt (NVFP4 or FP8)",
    "compressed-tensors": "compressed-tensors (FP8, NVFP4 or INT4)",
    "quark": "AMD Quark",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "torchao": "torchao",
    "eetq": "EETQ",
}
# Ends of names that only one kind of checkpoint has -> what that is; the first one found counts.
SIGNS = {
    ".absmax": "a bitsandbytes checkpoint",
    ".quant_map": "a bitsandbytes checkpoint",
    ".SCB": "a bitsandbytes checkpoint",
    ".qweight": "an AWQ or GPTQ checkpoint",
    ".qzeros": "an AWQ or GPTQ checkpoint",
    "weight_scale_2": "an NVFP4 checkpoint",
    ".weight_packed": "a checkpoint of compressed-tensors",
    "weight_scale_inv": "an FP8 checkpoint",
    "weight_scale": "an FP8 checkpoint",
    "input_scale": "an FP8 checkpoint",
    ".biases": "an MLX checkpoint",
    **dict.fromkeys(
        (f".experts.{part}_proj.{kind}" for part in ("gate", "up") for kind in ("weight", "bias")),
        "an MLX checkpoint",
    ),
}
UNMERGED = (".lora_A.", ".lora_magnitude_vector", ".base_layer.")  # parts of names
HEAD = re.compile(r"(?:.*\.)?(?:score|classifier|(?!lm_)\w+_head)(?:\.summary)?\.(?:weight|bias)")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
MODELOPT = "hf_quant_config.json"  # lies beside a config.json that says nothing


def refuse_foreign_config(raw: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError if config.json says that the weights are stored in another way."""
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in (None, "mxfp4"):
        name = QUANTISATIONS.get(method, "") if isinstance(method, str) else ""
        of = f" ({name})" if name else ""
        raise CheckpointError(
            f"{path}: quant_method: expected 'mxfp4' or none, found {method!r:.200}{of}; "
            f"{READ}: {GIVE}"
        )
    if "quantization" in raw:  # only MLX writes this key
        raise CheckpointError(
            f"{path}: expected the weights of transformers, found those of MLX "
            f"(quantization: {raw['quantization']!r:.200}); {READ}: {GIVE}"
        )


def refuse_foreign_names(names: Collection[str], where: Path) -> None:
    """Raise CheckpointError if the names of the tensors tell what this is."""
    for end, kind in SIGNS.items():
        name = next((name for name in names if name.endswith(end)), None)
        if name is not None:
            raise CheckpointError(
                f"{where}: expected weights of transformers, found tensor {shown(name)}: this "
                f"is {kind}; {READ}: {GIVE}"
            )
    for name in names:
        if any(part in name for part in UNMERGED):
            raise CheckpointError(
                f"{where}: expected a whole model, found tensor {shown(name)}: its adapter "
                "is not merged; call `merge_and_unload()` before `save_pretrained()`, or give base "
                "and adapter: osscompile compile BASE --adapter DIR"
            )
        if HEAD.fullmatch(name):
            raise CheckpointError(
                f"{where}: expected a language model, found tensor {shown(name)}, the head of "
                "a classifier or reward model; only models that predict the next token compile"
            )


def refuse_unknown_wrapper(names: Collection[str], where: Path) -> None:
    """Raise CheckpointError if the names of a whole model lie in something that is not known."""
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and embedding != "model.embed_tokens.weight":
        prefix = embedding.removesuffix("embed_tokens.weight")
        raise CheckpointError(
            f"{where}: expected names that begin with `model.`, found "
            f"`{shown(prefix)}` (of {shown(embedding)}); "
            "save the language model alone, with transformers"
        )


def refuse_foreign_types(tensors: Iterable[Stored]) -> None:
    """Raise CheckpointError if the types of the tensors tell what this is."""
    for stored in tensors:
        if stored.encoding in FLOAT8:
            raise CheckpointError(
                f"{stored}: expected BF16, F16, F32 or U8, found {stored.encoding}: this is an FP8 "
                f"checkpoint; {READ}: {GIVE}"
            )


def refuse_foreign_files(folder: Path) -> None:
    """Raise CheckpointError if a file beside the weights tells what they are."""
    path = folder / MODELOPT
    if has_file(path):
        quantization = read_json_object(path).get("quantization")
        algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
        if algorithm is not None:
            raise CheckpointError(
                f"{path}: quant_algo: expected none, found {algorithm!r:.200}, of "
                f"{QUANTISATIONS['modelopt']}; {READ}: {GIVE}"
            )
