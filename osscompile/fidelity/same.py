"""Whether an artifact can be of a checkpoint: all that it holds of the config is compared."""

import math
from pathlib import Path
from typing import NoReturn

import numpy as np

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
        ("experts per token", manifest.experts_per_token, config.num_experts_per_token),
        ("as rms_norm_eps", manifest.norm_eps, config.norm_eps),
        ("as swiglu_limit", manifest.swiglu_limit, config.swiglu_limit),
        ("positions", manifest.context, min(manifest.context, config.max_context)),
    ]
    for weight in weight_parameters(config, manifest.profile, manifest.context):
        size = math.prod(weight.shape)
        facts.append((f"numbers in {weight.name}", sizes.get(weight.name, 0), size))
    for name, expected, found in facts:
        if expected != found:
            _refuse(model, path, f"{expected} {name}", str(found))
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


def _rope_parts(config: ModelConfig, path: Path, manifest: Manifest) -> int | None:
    """The first position that the artifact rotates in another way than the config says."""
    entry = read_header(path / WEIGHTS)[ROPE]
    shape = manifest.context, config.head_dim // 2, 2
    found = np.fromfile(path / WEIGHTS, np.float32, math.prod(shape), offset=entry.offset)
    expected = rope_table(config, np.arange(manifest.context))
    same = np.isclose(found.reshape(shape), expected, rtol=0, atol=ROPE_ERROR).all(axis=(1, 2))
    return None if same.all() else int(same.argmin())
