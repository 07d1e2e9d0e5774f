"""Make the graph's weights from a checkpoint, in pieces that any thread can make.

Dense layers stay bfloat16 (exact) or become int8 (fast); MXFP4 stays as it is, bit for bit, in
another order; vectors become float32. `schedules/formats.py` reads what is written here.
"""

import threading
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..schedules.formats import BLOCK, FP4_PER_WORD
from .checkpoint import Source
from .config import ModelConfig
from .graph import Parameter

# A piece in its final form has so many, and so has a pass over one that cannot be as small (an
# expert has 8 MB): it stays in the cache, and threads work longer than they wait for Python's lock.
PIECE_BYTES = 1 << 20


class KeptScales:
    """Scales of int8 that were found with the words, until they are asked for: no weight is read
    twice. Several threads keep and take at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # scales, and which rows are here

    def keep(self, name: str, num_rows: int, start: int, scales: np.ndarray) -> None:
        """Scales [n, blocks] of rows from `start` on of a matrix of `num_rows`."""
        with self._lock:
            if name not in self._kept:
                room = np.empty((num_rows, *scales.shape[1:]), scales.dtype)
                self._kept[name] = room, np.zeros(num_rows, bool)
            kept, here = self._kept[name]
            kept[start : start + len(scales)] = scales
            here[start : start + len(scales)] = True

    def take(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Scales of rows [start, stop), or None if some are not here (yet)."""
        with self._lock:
            kept, here = self._kept.get(name, (np.empty(0), np.zeros(stop, bool)))
            if not here[start:stop].all():
                return None
            here[start:stop] = False
            if not here.any():
                self._kept.pop(name, None)
            return kept[start:stop]


def weight_pieces(
    parameter: Parameter,
    source: Source,
    packing: tuple[int, int] | None,
    kept: KeptScales | None = None,
) -> list[Callable[[], np.ndarray]]:
    """The tensor in its final layout, cut along its leading axis: for each piece, in order, a
    function that makes it. They may be called on any thread.

    `packing`: (axis of the rows, lanes) if rows lie side by side (`passes/pack_weights.py`).
    `kept`: where words leave scales for the tensor that follows them.
    """
    size = parameter.shape[0]
    row_bytes = max(1, int(np.prod(parameter.shape[1:])) * np.dtype(parameter.dtype).itemsize)
    if parameter.name.endswith(".scales"):
        row_bytes *= BLOCK  # each stands for a block of inputs, which is read to find it
    step = max(1, PIECE_BYTES // row_bytes)
    if packing is not None and packing[0] == 0:
        step = max(packing[1], step // packing[1] * packing[1])
    return [
        partial(_make_piece, parameter, source, packing, kept, start, min(start + step, size))
        for start in range(0, size, step)
    ]


def pack_rows(tensor: np.ndarray, axis: int, lanes: int) -> np.ndarray:
    """[.., rows, ..] -> [.., rows / lanes, .., lanes]."""
    shape = tensor.shape
    split = tensor.reshape(*shape[:axis], shape[axis] // lanes, lanes, *shape[axis + 1 :])
    return np.moveaxis(split, axis + 1, -1)


def _make_piece(
    parameter: Parameter,
    source: Source,
    packing: tuple[int, int] | None,
    kept: KeptScales | None,
    start: int,
    stop: int,
) -> np.ndarray:
    rows = _rows(parameter, source, kept, start, stop)
    assert rows.shape[1:] == parameter.shape[1:] and rows.dtype == parameter.dtype, parameter
    return np.ascontiguousarray(rows if packing is None else pack_rows(rows, *packing))


def _rows(
    parameter: Parameter, source: Source, kept: KeptScales | None, start: int, stop: int
) -> np.ndarray:
    name, _, part = parameter.name.rpartition(".")
    if parameter.name == "rope":
        return rope_table(source.config, np.arange(start, stop))
    if part == "words" and parameter.shape[-1] == BLOCK // FP4_PER_WORD:
        return mxfp4_words(source.read(f"{name}.blocks", start, stop))
    if part == "scales" and parameter.dtype == "uint8":
        return source.read(f"{name}.scales", start, stop)
    if part in ("words", "scales"):
        scales = kept.take(name, start, stop) if kept is not None and part == "scales" else None
        if scales is not None:
            return scales
        words, scales = _int8(name, source, start, stop)
        if kept is not None and part == "words":
            kept.keep(name, parameter.shape[0], start, scales)
        return words if part == "words" else scales
    values = source.read(parameter.name, start, stop)
    if parameter.dtype == "uint16":
        bits = values.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)
        _refuse_nan(parameter.name, start, stop, bits & 0x7FFF > 0x7F80)
        return bits
    _refuse_nan(parameter.name, start, stop, np.isnan(values))
    return values.astype(np.float32)


def _refuse_nan(name: str, start: int, stop: int, is_nan: np.ndarray) -> None:
    """Infinities pass: a router's bias of -inf is how some switch an expert off."""
    if is_nan.any():
        raise CheckpointError(
            f"{name}, rows {start} to {stop - 1}: expected numbers, found NaN; check where this "
            "checkpoint comes from, or download it again"
        )


def _int8(name: str, source: Source, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Words [rows, blocks, 8] uint32 and scales [rows, blocks] float16."""
    stored = source.read_int8(f"{name}.weight", start, stop)
    if stored is not None:  # a second rounding would only lose
        words, scales = stored[0].view("<u4").reshape(*stored[1].shape, -1), stored[1]
    else:
        weight = source.read(f"{name}.weight", start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # such scales are refused below
            words, scales = quantize_q8(weight)
    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{name}.weight, rows {start} to {stop - 1}: expected finite weights that int8 "
            "with float16 scales can hold, found one beyond 8.3 million, or NaN; compile with "
            "the profile `exact`, or check where this checkpoint comes from"
        )
    return words, scales


def mxfp4_words(blocks: np.ndarray) -> np.ndarray:
    """[.., 16] uint8, two neighbouring inputs a byte, low nibble first -> [.., 4] uint32: inputs p
    and p + 4 of eight share byte p, the lower one in its low nibble."""
    words = np.array(blocks, order="C").view("<u4")
    for part in np.array_split(words.reshape(-1), 1 + words.nbytes // PIECE_BYTES):
        # Inputs 0 1 2 3 4 5 6 7 of a word become 0 1 4 5 2 3 6 7, then 0 4 1 5 2 6 3 7.
        _swap_bits(part, 8, 0x0000FF00)
        _swap_bits(part, 4, 0x00F000F0)
    return words


def _swap_bits(words: np.ndarray, distance: int, mask: int) -> None:
    """Exchange the bits of the mask with those `distance` above, in place."""
    differing = words >> np.uint32(distance)
    differing ^= words
    differing &= np.uint32(mask)
    differing *= np.uint32(1 << distance | 1)  # a copy of them at either place
    words ^= differing


def quantize_q8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[rows, inputs] bfloat16 or float32 -> words [rows, blocks, 8] uint32 of four int8 each, and
    scales [rows, blocks] float16. Values are rounded to the nearest multiple of the scale as
    stored."""
    scales = q8_scales(weight)
    blocks = weight.astype(np.float32).reshape(*scales.shape, BLOCK)
    divisor = np.where(scales > 0, scales, 1).astype(np.float32)
    blocks /= divisor[..., None]
    np.rint(blocks, out=blocks)  # within -127..127, as scales were rounded up
    return blocks.astype(np.int8).view("<u4"), scales


def q8_scales(weight: np.ndarray) -> np.ndarray:
    """Largest magnitude of each block of 32 inputs / 127, rounded up to float16.

    Rounded up, so that the largest value is not clipped.
    """
    rows, inputs = weight.shape
    # The order of bits is that of magnitudes.
    largest: np.ndarray
    if weight.dtype == ml_dtypes.bfloat16:
        largest = weight.view(np.uint16).reshape(-1) & np.uint16(0x7FFF)
    else:
        largest = weight.view(np.uint32).reshape(-1) & np.uint32(0x7FFFFFFF)
    while largest.size > rows * (inputs // BLOCK):  # faster than max() over a short axis
        largest = np.maximum(largest[0::2], largest[1::2])
    if largest.dtype == np.uint16:
        largest = largest.astype(np.uint32) << np.uint32(16)
    exact = largest.view(np.float32) / np.float32(127)
    scales: np.ndarray = exact.astype(np.float16)
    scales.view(np.uint16)[...] += scales.astype(np.float32) < exact  # to the next float16
    return scales.reshape(rows, inputs // BLOCK)


def rope_table(config: ModelConfig, positions: np.ndarray) -> np.ndarray:
    """cos and sin [positions, head_dim / 2, 2] float32, from float64 angles; both include YaRN's
    concentration. YaRN: Peng et al. 2023, section 3, as in the model's reference code."""
    rope, half = config.rope, config.head_dim // 2
    frequency = rope.theta ** (-np.arange(half, dtype=np.float64) / half)
    concentration = 1.0
    if rope.factor > 1:
        concentration = 0.1 * np.log(rope.factor) + 1.0

        def dimension(turns: float) -> float:
            """Index of the pair that turns so often within the original context."""
            angle = rope.original_context / (turns * 2 * np.pi)
            return float(half * np.log(angle) / np.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = np.floor(low), np.ceil(high)
        # transformers clamps these bounds, and widens a ramp of no width, in the same way.
        low, high = max(low, 0.0), min(high, config.head_dim - 1.0)
        width = high - low or 1e-3
        ramp = np.clip((np.arange(half) - low) / width, 0, 1)
        frequency = frequency / rope.factor * ramp + frequency * (1 - ramp)
    angles = positions[:, None].astype(np.float64) * frequency
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * concentration
    return table.astype(np.float32)
