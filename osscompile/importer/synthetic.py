"""Generate seeded random weights of any gpt-oss shape, row by row, as fast as a disk reads them.

How the scales were chosen: every matrix gets the rms that gives its output a wanted rms (a gain,
below) for independent inputs of known rms, i.e. gain / (input rms * sqrt(inputs)). RMSNorm pins the
input of all but `out` and `down`, so the residual stream grows like a random walk, about as the
square root of the depth, and stays finite at any depth.
"""

import hashlib
import math

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..options import shown
from .checkpoint import canonical_shapes
from .config import ModelConfig, RopeConfig

CHUNK_BYTES = 1 << 20  # rows come in chunks of about this size, each with a seed of its own

# A weight is a random sign and one of the 512 bf16 magnitudes from its smallest on: four octaves,
# about log-uniform, taken from random bits by one mask and one addition.
WEIGHT_MASK = 0x81FF
WEIGHT_RMS = 7.04  # over the smallest magnitude: sqrt(7/3 * mean(4**0 .. 4**3))
# Norm weights are positive, from 0.5 up to 2.
NORM_MASK = 0x00FF
NORM_SMALLEST = 0.5
NORM_RMS = 1.21  # sqrt(7/3 * mean(0.5**2, 1**2))
# All 16 fp4 codes are equally likely; scales are one of four neighbouring powers of two.
SCALE_MASK = 0x03
MXFP4_RMS = 13.5  # over the smallest scale: rms of the codes 2.93 * rms of 2**0 .. 2**3

EMBED_RMS = 2.0
QKV_GAIN = 1.0  # scores spread by about 1.8 (YaRN scales q and k): peaked, but not on one key
OUT_GAIN = 0.7  # of values averaged over the keys, so less arrives
ROUTER_GAIN = 1.5
GATE_UP_GAIN = 3.0  # the clamp at 7 then cuts a few percent of the activations
DOWN_GAIN = 1.2
SWIGLU_RMS = 6.0  # of the input of `down`, at this GATE_UP_GAIN (measured: 5 to 9)
LOGIT_VARIANCE = 0.6  # over ln(vocabulary): the entropy is then about 0.7 ln(vocabulary)
BIAS_RMS = 0.1
SINK_RMS = 1.0


def synthetic_source(name: str) -> "SyntheticSource":
    """Random weights in the shape of "gpt-oss-20b", "gpt-oss-120b" or "tiny" (for tests).

    Raises CheckpointError for another name.
    """
    configs = {
        "gpt-oss-20b": gpt_oss_config(num_layers=24, num_experts=32),
        "gpt-oss-120b": gpt_oss_config(num_layers=36, num_experts=128),
        "tiny": TINY,
    }
    if name not in configs:
        raise CheckpointError(
            f"synthetic:{shown(name)}: expected one of {', '.join(configs)}, found {name!r:.200}"
        )
    return SyntheticSource(configs[name])


def gpt_oss_config(num_layers: int, num_experts: int) -> ModelConfig:
    """The published models; they differ only in these two numbers."""
    return ModelConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=num_experts,
        num_experts_per_token=4,
        window=128,
        sliding=tuple(layer % 2 == 0 for layer in range(num_layers)),
        max_context=131072,
        norm_eps=1e-5,
        swiglu_limit=7.0,
        rope=RopeConfig(
            theta=150000.0,
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            original_context=4096,
            truncate=False,
        ),
    )


# Small, with all that tells widths apart: hidden, intermediate and query width all differ.
TINY = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_heads=16,
    num_kv_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_token=4,
    window=16,
    sliding=(True, False, True, False),
    max_context=131072,
    norm_eps=1e-5,
    swiglu_limit=7.0,
    rope=gpt_oss_config(num_layers=1, num_experts=4).rope,
)


class SyntheticSource:
    """A `Source` of random weights: the same for the same seed, however the rows are cut."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._shapes = canonical_shapes(config)
        self._rms = _weight_rms(config)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one canonical tensor."""
        return self._shapes[name][0]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the leading axis, contiguous, as ml_dtypes.bfloat16 or uint8."""
        shape, dtype = self._shapes[name]
        assert 0 <= start <= stop <= shape[0], f"{name}: rows {start}..{stop} of {shape[0]}"
        row_size = math.prod(shape[1:])
        chunk_rows = max(1, CHUNK_BYTES // (row_size * (2 if dtype == "bf16" else 1)))
        rows: np.ndarray = np.empty((stop - start, row_size), "<u2" if dtype == "bf16" else "u1")
        for chunk in range(start // chunk_rows, -(-stop // chunk_rows)):
            first = chunk * chunk_rows
            begin, end = max(start, first), min(stop, first + chunk_rows)
            # Values are drawn in row order, so those after `end` need not be drawn at all.
            values = self._values(name, chunk, (end - first) * row_size, rows.dtype)
            rows[begin - start : end - start] = values.reshape(-1, row_size)[begin - first :]
        bits = rows.reshape(stop - start, *shape[1:])
        return bits.view(ml_dtypes.bfloat16) if dtype == "bf16" else bits

    def read_int8(self, name: str, start: int, stop: int) -> None:
        """None: it holds no int8."""

    def requantised(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def _values(self, name: str, chunk: int, count: int, dtype: np.dtype) -> np.ndarray:
        key = hashlib.blake2b(f"{self.seed}/{name}/{chunk}".encode(), digest_size=16).digest()
        generator = np.random.SFC64(int.from_bytes(key, "little"))
        words = generator.random_raw(-(-count * dtype.itemsize // 8)).astype("<u8", copy=False)
        bits: np.ndarray = words.view(dtype)[:count]
        kind = name.split(".", 2)[2] if name.startswith("layers.") else name
        if kind.endswith(".blocks"):
            return bits
        if kind.endswith(".scales"):
            smallest = 127 + round(math.log2(self._rms[kind] / MXFP4_RMS))
            return _shifted(bits, SCALE_MASK, smallest)
        if kind.endswith("norm.weight"):
            return _shifted(bits, NORM_MASK, _bf16_bits(NORM_SMALLEST))
        return _shifted(bits, WEIGHT_MASK, _bf16_bits(self._rms[kind] / WEIGHT_RMS))


def _weight_rms(config: ModelConfig) -> dict[str, float]:
    """Wanted rms per kind of tensor; of the dequantised weights where it is `scales`."""
    normed = NORM_RMS * math.sqrt(config.hidden_size)
    return {
        "embed.weight": EMBED_RMS,
        "qkv.weight": QKV_GAIN / normed,
        "qkv.bias": BIAS_RMS,
        "sinks": SINK_RMS,
        "out.weight": OUT_GAIN / math.sqrt(config.q_size),
        "out.bias": BIAS_RMS,
        "router.weight": ROUTER_GAIN / normed,
        "router.bias": BIAS_RMS,
        "gate_up.scales": GATE_UP_GAIN / normed,
        "gate_up.bias": BIAS_RMS,
        "down.scales": DOWN_GAIN / (SWIGLU_RMS * math.sqrt(config.intermediate_size)),
        "down.bias": BIAS_RMS,
        "lm_head.weight": math.sqrt(LOGIT_VARIANCE * math.log(config.vocab_size)) / normed,
    }


def _shifted(bits: np.ndarray, mask: int, smallest: int) -> np.ndarray:
    """Keep the masked bits and add the smallest value's: in place, on an array of our own."""
    bits &= bits.dtype.type(mask)
    bits += bits.dtype.type(smallest)
    return bits


def _bf16_bits(value: float) -> int:
    return int(np.array(value, ml_dtypes.bfloat16).view(np.uint16))
