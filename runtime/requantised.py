"""What quantising experts to MXFP4 changed: a file of the artifact, where it changed anything."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from .fields import FieldError, parse_fields, read_small
from .manifest import REQUANTISED, Manifest, damaged

HEADING = "experts were quantised to MXFP4; relative rms by which that changed their weights:"
MAX_BYTES = 1 << 20
PARTS = {"gate_up": "gate/up", "down": "down"}


def read_requantised(artifact: Path, manifest: Manifest) -> dict[str, float]:
    """ "layers.N.gate_up" or "layers.N.down" -> relative rms, of those that changed. Raises
    ArtifactError."""
    expected = manifest.files.get(REQUANTISED)
    if expected is None:
        return {}
    file = artifact / REQUANTISED
    try:
        content = read_small(file, MAX_BYTES)
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            raise ValueError("another sha256 than the manifest's")
        changed = parse_fields(dict[str, float], json.loads(content), "its contents")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, "what the compile wrote", str(error)) from error
    except FieldError as error:
        raise damaged(file, error.expected, error.found) from None
    layers = range(len(manifest.sliding))
    unknown = changed.keys() - {f"layers.{i}.{part}" for i in layers for part in PARTS}
    if unknown or not changed:
        raise damaged(file, f"experts of {len(layers)} layers", ", ".join(unknown) or "none")
    return dict(changed)


def requantised_by_layer(changed: Mapping[str, float]) -> str:
    """A table with a line a layer, columns of gate/up and down."""
    layers: dict[int, dict[str, float]] = {}
    for name, value in changed.items():
        _, index, part = name.split(".")
        layers.setdefault(int(index), {})[part] = value
    lines = [HEADING, "  layer   gate/up      down"]
    for layer, parts in sorted(layers.items()):
        cells = (f"{100 * parts.get(part, 0.0):8.3f} %" for part in PARTS)
        lines.append(f"{layer:7}{''.join(cells)}")
    return "\n".join(lines)


def requantised_summary(changed: Mapping[str, float]) -> str:
    """The mean and the worst of all layers, a line for gate/up and one for down."""
    lines = [HEADING]
    for part, name in PARTS.items():
        layers = {name: value for name, value in changed.items() if name.endswith(f".{part}")}
        if layers:
            worst = max(layers, key=lambda name: layers[name])
            mean = sum(layers.values()) / len(layers)
            lines.append(
                f"  {name:<8}{100 * mean:8.3f} % in the mean of {len(layers)} layers, "
                f"{100 * layers[worst]:.3f} % at most, in layer {worst.split('.')[1]}"
            )
    return "\n".join(lines)
