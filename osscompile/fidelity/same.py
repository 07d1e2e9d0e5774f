"""Whether an artifact can be of a checkpoint: all that it holds of the config is compared.

The kernels hold `rms_norm_eps` and `swiglu_limit`, which nothing reads out of them again.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..compiler import decode_bytes
from ..importer.config import ModelConfig
from ..importer.graph import weight_parameters
from ..importer.weights import rope_table
from ..options import shown
from ..runtime.fidelity import FidelityError
from ..runtime.manifest import ROPE, WEIGHTS, Manifest
from ..runtime.safetensors import read_header

ROPE_ERROR = 1e-5  # other machines' sines may differ in the last bit


def check_same_model(model: str, config: ModelConfig, path: Path, manifest: Manifest) -> None:
    """Raise FidelityError, naming the first thing that differs."""
    sizes = {weight.name: math.prod(weight.shape) for weight in manifest.weights}
    facts: list[tuple[str, object, object]] = [
        ("ids in the vocabulary", manifest.vocab_size, config.vocab_size),
        ("layers", len(manifest.sliding), config.num_layers),
        ("as window", manifest.window, config.window),
        ("as sliding layers", _sliding(manifest.sliding), _sliding(config.sliding)),
        ("positions", manifest.context, min(manifest.context, config.max_context)),
    ]
    for weight in weight_parameters(config, manifest.profile, manifest.context):
        size = math.prod(weight.shape)
        facts.append((f"numbers in {weight.name}", sizes.get(weight.name, 0), size))
    for name, expected, found in facts:
        if expected != found:
            _refuse(model, path, f"{expected} {name}", str(found))
    chosen, found = _experts_per_token(config, manifest), config.num_experts_per_token
    if chosen != found:
        _refuse(model, path, f"{chosen or 'other'} experts per token", str(found))
    position = _rope_parts(config, path, manifest)
    if position is not None:
        rotation = f"its rotation of position {position}"
        _refuse(model, path, rotation, "another (of rope_theta, or a field of rope_scaling)")


def _refuse(model: str, path: Path, expected: str, found: str) -> NoReturn:
    raise FidelityError(
        f"{shown(model)}: expected the checkpoint that {path} was compiled from, with {expected}, "
        f"found one with {found}"
    )


def _sliding(layers: tuple[bool, ...]) -> str:
    return ", ".join(str(i) for i, sliding in enumerate(layers) if sliding) or "none"


def _experts_per_token(config: ModelConfig, manifest: Manifest) -> int | None:
    """Those of the artifact: so many that a step reads as much as it says; None if no number is."""
    for number in range(1, config.num_experts + 1):
        other = replace(config, num_experts_per_token=number)
        if decode_bytes(other, manifest.weights) == manifest.decode_bytes:
            return number
    return None


def _rope_parts(config: ModelConfig, path: Path, manifest: Manifest) -> int | None:
    """The first position that the artifact rotates in another way than the config says."""
    entry = read_header(path / WEIGHTS)[ROPE]
    shape = manifest.context, config.head_dim // 2, 2
    found = np.fromfile(path / WEIGHTS, np.float32, math.prod(shape), offset=entry.offset)
    expected = rope_table(config, np.arange(manifest.context))
    same = np.isclose(found.reshape(shape), expected, rtol=0, atol=ROPE_ERROR).all(axis=(1, 2))
    return None if same.all() else int(same.argmin())
