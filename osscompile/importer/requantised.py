"""Tell what quantising experts to MXFP4 has cost."""

from collections.abc import Mapping


def describe_requantised(changed: Mapping[str, float]) -> str:
    """One table of `Source.requantised`: a line a layer, columns of gate/up and down."""
    layers: dict[int, dict[str, float]] = {}
    for name, value in changed.items():
        _, index, part = name.split(".")
        layers.setdefault(int(index), {})[part] = value
    lines = [
        "experts were quantised to MXFP4; relative rms by which that changed their weights:",
        "  layer   gate/up      down",
    ]
    for layer, parts in sorted(layers.items()):
        cells = (f"{100 * parts.get(part, 0.0):8.3f} %" for part in ("gate_up", "down"))
        lines.append(f"{layer:7}{''.join(cells)}")
    return "\n".join(lines)
