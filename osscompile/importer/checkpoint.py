"""What every form of a checkpoint becomes: one canonical set of tensors, read by rows.

MXFP4 stays packed and bf16 stays bf16. Everything is checked when the checkpoint opens, from the
headers alone; after that, rows are read as they are asked for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..runtime.sampling_options import Sampling
from .config import ModelConfig


class Source(Protocol):
    """The weights of one model under their canonical names (see `canonical_shapes`).

    Several threads read at once.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one canonical tensor."""

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the leading axis, contiguous, as ml_dtypes.bfloat16 or uint8; as
        float32 where the checkpoint holds what bfloat16 cannot.

        Raises CheckpointError if the stored values cannot be read or used.
        """

    def read_int8(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows [start, stop) of a matrix as the checkpoint holds them, if as whole numbers from
        -127 to 127 [rows, blocks, 32] int8 with scales [rows, blocks] float16; else None."""

    def requantised(self) -> dict[str, float]:
        """What quantising to MXFP4 changed of what was read so far: "layers.N.gate_up" or
        "layers.N.down" -> relative rms of the change."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint of any form. `tokenizer` is the path of a tokenizer.json, its bytes where the
    form has none, or None; `generation` holds generation_config.json, or what stands for it;
    `sampling` is what it says of sampling; `chat_template` is a text of jinja, or None."""

    source: Source
    tokenizer: Path | bytes | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    chat_template: str | None = None


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, "bf16" or "u8") of every tensor, in the order in which data flows.

    `qkv` holds the rows of q, then k, then v. Axis 1 of `gate_up` is 0 = gate, 1 = up. `blocks`
    hold 32 fp4 values in 16 bytes, the first of each pair in the low nibble; `scales` are e8m0.
    """
    vocab, hidden, intermediate = config.vocab_size, config.hidden_size, config.intermediate_size
    experts = config.num_experts
    gate_up = (experts, 2, intermediate)
    down = (experts, hidden)
    layer: dict[str, tuple[tuple[int, ...], str]] = {
        "attn_norm.weight": ((hidden,), "bf16"),
        "qkv.weight": ((config.qkv_size, hidden), "bf16"),
        "qkv.bias": ((config.qkv_size,), "bf16"),
        "sinks": ((config.num_heads,), "bf16"),
        "out.weight": ((hidden, config.q_size), "bf16"),
        "out.bias": ((hidden,), "bf16"),
        "mlp_norm.weight": ((hidden,), "bf16"),
        "router.weight": ((experts, hidden), "bf16"),
        "router.bias": ((experts,), "bf16"),
        "gate_up.blocks": ((*gate_up, config.hidden_blocks, 16), "u8"),
        "gate_up.scales": ((*gate_up, config.hidden_blocks), "u8"),
        "gate_up.bias": (gate_up, "bf16"),
        "down.blocks": ((*down, config.intermediate_blocks, 16), "u8"),
        "down.scales": ((*down, config.intermediate_blocks), "u8"),
        "down.bias": (down, "bf16"),
    }
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"embed.weight": ((vocab, hidden), "bf16")}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": spec for name, spec in layer.items()}
    shapes["norm.weight"] = ((hidden,), "bf16")
    shapes["lm_head.weight"] = ((vocab, hidden), "bf16")
    return shapes
