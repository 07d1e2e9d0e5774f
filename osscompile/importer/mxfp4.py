"""Weights to MXFP4 and back: 32 consecutive inputs share a scale, a power of two (OCP Microscaling
Formats v1.0, section 5.3).

What was MXFP4 before comes back with every bit of every weight, -0 included: its largest magnitude
is 6, 4, 3, 2, .. times a power of two, so that the scale found here is the stored one or a smaller
one, which holds the same numbers.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

BLOCK = 32
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], "f4")
SCALE_NAN = 255  # the only e8m0 byte that is no power of two (OCP Microscaling, section 5.4.1)

# The largest magnitude of a block becomes at most this many times its scale, and what is above 6 is
# cut off. On normal weights 7.25 errs least: 11.15 %, against 11.84 at 6 and 11.34 at 8.
LARGEST = 7.25
# Above these magnitudes the next code is nearer; a tie goes to the even code, which of True is the
# upper one.
STEPS = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)
BELOW_STEPS = 3  # binary places from 1 down to what surely becomes 0

SLAB = 1 << 17  # weights at a time: what is computed of them stays in the cache
MEASURED = 4  # of so many slabs the first is measured: a third of the work, for digits nobody needs
LEAST_EXPONENT = 6  # of a block's largest weight, so that no arithmetic on exponents falls below 0
RAISE = 64  # binary places by which blocks of smaller weights are multiplied meanwhile


@dataclass
class Quantised:
    """blocks [rows, groups, 16] and scales [rows, groups] uint8; sums of squares of what rounding
    changed and of the weights, both over the same sample of slabs."""

    blocks: np.ndarray
    scales: np.ndarray
    changed: float
    total: float

    @classmethod
    def empty(cls, rows: int, inputs: int) -> "Quantised":
        """Room for parts."""
        groups = inputs // BLOCK
        blocks = np.empty((rows, groups, BLOCK // 2), np.uint8)
        return cls(blocks, np.empty((rows, groups), np.uint8), 0.0, 0.0)

    def put(self, rows: slice, inputs: slice, part: "Quantised") -> None:
        """Put a part in its place: the inputs are whole blocks, or all."""
        groups = slice(None)
        if inputs != groups:
            groups = slice(inputs.start // BLOCK, inputs.stop // BLOCK)
        self.blocks[rows, groups], self.scales[rows, groups] = part.blocks, part.scales
        self.changed += part.changed
        self.total += part.total


def quantise(weights: np.ndarray) -> Quantised:
    """[rows, inputs] bfloat16 or float32, in any order in memory, all finite.

    Raises ValueError if one is not.
    """
    rows, inputs = weights.shape
    made = Quantised.empty(rows, inputs)
    # Slabs are cut where they are contiguous in memory.
    if weights.strides[0] < weights.strides[1]:
        step = max(1, SLAB // (rows * BLOCK)) * BLOCK
        slabs = [(slice(None), slice(i, min(i + step, inputs))) for i in range(0, inputs, step)]
    else:
        step = max(1, SLAB // inputs)
        slabs = [(slice(i, i + step), slice(None)) for i in range(0, rows, step)]
    for number, slab in enumerate(slabs):
        made.put(*slab, _quantise_slab(weights[slab], measure=number % MEASURED == 0))
    return made


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[rows, groups, 16] and [rows, groups] uint8 -> [rows, inputs] float32."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    weights = FP4_VALUES[codes]
    weights *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    return weights.reshape(len(weights), -1)


def pairs_of_halves(packed: np.ndarray) -> np.ndarray:
    """[.., 16] uint8, inputs i and i + 16 in byte i as ggml has them -> inputs 2i and 2i + 1."""
    two = np.ascontiguousarray(packed).view("<u2")  # 2i, 2i + 16, 2i + 1, 2i + 17: four bits each
    pairs = np.empty(packed.shape, np.uint8)
    pairs[..., :8] = two & np.uint16(0x0F) | two >> np.uint16(4) & np.uint16(0xF0)
    pairs[..., 8:] = two >> np.uint16(4) & np.uint16(0x0F) | two >> np.uint16(8) & np.uint16(0xF0)
    return pairs


def _quantise_slab(slab: np.ndarray, measure: bool) -> Quantised:
    weights = slab.reshape(len(slab), -1, BLOCK)
    codes, scales, small = _encode(weights, least_scale=0)
    if small.any():
        raised = weights[small].astype(np.float32) * np.float32(2.0**RAISE)
        codes[small], raised_scales, _ = _encode(raised, least_scale=RAISE)
        scales[small] = raised_scales - RAISE
    changed, total = _change(weights, codes, scales) if measure else (0.0, 0.0)
    codes |= _negative(weights)
    # Numpy multiplies and compares bytes many times faster than it shifts them.
    blocks = codes[..., 0::2] | codes[..., 1::2] * np.uint8(16)
    return Quantised(blocks, scales, changed, total)


def _encode(weights: np.ndarray, least_scale: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[.., 32] -> codes of the magnitudes [.., 32], scales [..], and of which blocks both are wrong
    as their weights are too small. All of it compares bits: their order is that of magnitudes."""
    bits, mantissa = _bits(weights)
    one = bits.dtype.type
    magnitudes = bits & one((1 << (8 + mantissa)) - 1)
    largest = magnitudes.max(axis=-1)
    if (largest >= 255 << mantissa).any():
        raise ValueError("a weight that is not finite")
    exponents = (largest >> one(mantissa)).astype(np.int16)
    cut = largest & one((1 << mantissa) - 1) > int((LARGEST / 4 - 1) * (1 << mantissa))
    scales = np.maximum(exponents - 2 + cut, max(least_scale, BELOW_STEPS))
    floor = (scales - BELOW_STEPS).astype(bits.dtype)[..., None] << one(mantissa)
    np.maximum(magnitudes, floor, out=magnitudes)
    magnitudes -= floor
    codes, above = np.zeros_like(magnitudes, np.uint8), np.empty_like(magnitudes, bool)
    for step in _steps(mantissa):
        np.greater(magnitudes, one(step), out=above)
        codes += above.view(np.uint8)
    return codes, scales.astype(np.uint8), (largest > 0) & (exponents < LEAST_EXPONENT)


def _steps(mantissa: int) -> list[int]:
    """STEPS as bits above the floor: a code is the number of steps that its magnitude exceeds."""
    steps = []
    for value, tie_goes_up in STEPS:
        bits = int(np.float32(value).view(np.uint32)) - ((127 - BELOW_STEPS) << 23)
        steps.append((bits >> (23 - mantissa)) - tie_goes_up)
    return steps


def _change(weights: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> tuple[float, float]:
    """Sums of squares of what the codes of the magnitudes change, and of the weights."""
    doubled = codes + (codes > 4) + (codes > 5) + (codes > 6) * np.uint8(3)  # 0 1 2 3 4 6 8 12
    changed = doubled.astype(np.float32)
    changed *= np.ldexp(np.float32(0.5), scales.astype(np.int32) - 127)[..., None]
    values = np.abs(_float32(weights))
    changed -= values
    return _sum_of_squares(changed), _sum_of_squares(values)


def _bits(weights: np.ndarray) -> tuple[np.ndarray, int]:
    """The weights as whole numbers, and how many bits of each are mantissa."""
    if weights.dtype == ml_dtypes.bfloat16:
        return weights.view(np.uint16), 7
    return weights.view(np.uint32), 23


def _float32(weights: np.ndarray) -> np.ndarray:
    """As `astype` makes them, which for bfloat16 is slow."""
    bits, mantissa = _bits(weights)
    return weights if mantissa == 23 else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _negative(weights: np.ndarray) -> np.ndarray:
    """The sign of each weight, where a code has it."""
    bits, mantissa = _bits(weights)
    signs: np.ndarray = (bits >= 1 << (8 + mantissa)) * np.uint8(8)
    return signs


def _sum_of_squares(values: np.ndarray) -> float:
    flat = values.ravel(order="K")
    with np.errstate(over="ignore"):  # of weights beyond 1e19, whose error nobody will ask for
        return float(np.einsum("i,i->", flat, flat))  # BLAS would start threads of its own
