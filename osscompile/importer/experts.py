"""The matrices of one layer's experts as MXFP4: as they are stored, or quantised while they pass.

Each expert is read once, in parts that stay small: what its blocks have taught of its scales is
kept until somebody asks for those.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import CheckpointError
from .mxfp4 import BLOCK, SCALE_NAN, Quantised, dequantise, pairs_of_halves, quantise
from .stored import Rows

MXFP4_OF_GGML = {"MXFP4": True, "MXFP4 in pairs": False}  # True: byte i holds inputs i and i + 16
PART = 1 << 20  # weights of an expert that are numbers at a time

# (expert, half) -> B [rows of the half, rank] and A [rank, inputs] float32; the half gains B A.
Delta = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def split_gate_and_up(halves: list[np.ndarray]) -> np.ndarray:
    """[n, 2 rows, ..], of which row 2i is gate i and row 2i + 1 up i, or gate and up apart
    -> [n, 2, rows, ..], contiguous."""
    if len(halves) == 2:
        return np.stack(halves, axis=1)
    stored = halves[0]
    pairs = stored.reshape(stored.shape[0], -1, 2, *stored.shape[2:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2))


@dataclass(frozen=True)
class Half:
    """All rows of every expert, or gate or up alone.

    `weights` are [experts, rows, inputs], or [experts, inputs, rows] if `transposed`; or U8 blocks
    [experts, rows, groups, 16] with `scales` [experts, rows, groups].
    """

    weights: Rows
    scales: Rows | None = None
    transposed: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Rows and inputs of an expert."""
        shape = self.weights.shape
        if self.scales is not None:
            return shape[1], shape[2] * BLOCK
        return (shape[2], shape[1]) if self.transposed else (shape[1], shape[2])


class Experts:
    """One or two halves; `gate_up`: whose rows are gates and ups."""

    def __init__(self, halves: tuple[Half, ...], gate_up: bool) -> None:
        self.halves, self.gate_up = halves, gate_up
        num_experts = halves[0].weights.shape[0]
        self._deltas: list[Delta] = []
        self._locks = [threading.Lock() for _ in range(num_experts)]
        self._scales: dict[int, list[np.ndarray]] = {}  # of experts whose blocks were made
        self._changes: dict[int, tuple[float, float]] = {}

    def add(self, delta: Delta) -> None:
        """Add it to the weights before they are quantised."""
        self._deltas.append(delta)

    def blocks(self, start: int, stop: int) -> np.ndarray:
        """What experts [start, stop) have: [n, (2,) rows, groups, 16] uint8."""
        if self._is_packed():
            return self._arrange([_shaped(half.weights, start, stop) for half in self.halves])
        made = [self._make(expert, keep_scales=True)[0] for expert in range(start, stop)]
        return self._stack(made)

    def scales(self, start: int, stop: int) -> np.ndarray:
        """What experts [start, stop) have: as `blocks`, without the last axis."""
        if self._is_packed():
            return self._arrange([_scales(half, start, stop) for half in self.halves])
        return self._stack([self._scales_of(expert) for expert in range(start, stop)])

    def changed(self) -> float:
        """Relative rms by which quantising changed the experts made so far."""
        # Without rounding, because threads make experts in any order.
        changed = math.fsum(part for part, _ in self._changes.values())
        total = math.fsum(part for _, part in self._changes.values())
        return math.sqrt(changed / total) if changed > 0 and math.isfinite(total) else 0.0

    def _is_packed(self) -> bool:
        return not self._deltas and all(half.scales is not None for half in self.halves)

    def _scales_of(self, expert: int) -> list[np.ndarray]:
        with self._locks[expert]:  # a thread may still make its blocks
            kept = self._scales.pop(expert, None)
        return kept if kept is not None else self._make(expert, keep_scales=False)[1]

    def _make(self, expert: int, keep_scales: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Blocks and scales of an expert, each by halves."""
        with self._locks[expert]:
            made = [self._make_half(expert, index) for index in range(len(self.halves))]
            scales = [half.scales for half in made]
            self._changes[expert] = (sum(h.changed for h in made), sum(h.total for h in made))
            if keep_scales:
                self._scales[expert] = scales
        return [half.blocks for half in made], scales

    def _make_half(self, expert: int, index: int) -> Quantised:
        half = self.halves[index]
        rows, inputs = half.size
        per_expert, width = (inputs, rows) if half.transposed else (rows, inputs)
        step = max(BLOCK, PART // width // BLOCK * BLOCK)
        made = Quantised.empty(rows, inputs)
        deltas = [delta(expert, index) for delta in self._deltas]
        for at in range(0, per_expert, step):
            part = slice(at, min(at + step, per_expert))
            if half.transposed:
                made.put(slice(None), part, self._quantise(half, expert, part, deltas))
            else:
                made.put(part, slice(None), self._quantise(half, expert, part, deltas))
        return made

    def _quantise(
        self,
        half: Half,
        expert: int,
        part: slice,
        deltas: list[tuple[np.ndarray, np.ndarray]],
    ) -> Quantised:
        """A part of an expert: some of its rows, or of its inputs if they are stored transposed."""
        if not deltas and half.weights.encodings <= MXFP4_OF_GGML.keys():
            return _ggml_mxfp4(half, expert, part)
        weights = _weights(half, expert, part)
        if deltas:
            weights = weights.astype(np.float32)  # a copy of our own
            for b, a in deltas:
                weights += b @ a[:, part] if half.transposed else b[part] @ a
        try:
            return quantise(weights)
        except ValueError as error:
            raise CheckpointError(
                f"{half.weights.parts[0]}: expected finite weights, found {error} in expert "
                f"{expert}; check where this checkpoint comes from"
            ) from error

    def _stack(self, made: list[list[np.ndarray]]) -> np.ndarray:
        """The halves of each expert -> as `_arrange`."""
        if len(made) == 1:  # the usual case, without another copy
            return self._arrange([half[None] for half in made[0]])
        return self._arrange([np.stack(halves) for halves in zip(*made, strict=True)])

    def _arrange(self, halves: list[np.ndarray]) -> np.ndarray:
        return split_gate_and_up(halves) if self.gate_up else halves[0]


def _shaped(rows: Rows, start: int, stop: int) -> np.ndarray:
    return rows.raw(start, stop).reshape(stop - start, *rows.shape[1:])


def _scales(half: Half, start: int, stop: int) -> np.ndarray:
    assert half.scales is not None
    scales = _shaped(half.scales, start, stop)
    _check_scales(half.scales, scales, start, stop)
    return scales


def _check_scales(rows: Rows, scales: np.ndarray, start: int, stop: int) -> None:
    if scales.size and scales.max() == SCALE_NAN:
        raise CheckpointError(
            f"{rows.parts[0]}: expected scales that are powers of two, found the byte "
            f"{SCALE_NAN} (NaN) in rows {start} to {stop - 1}; download the checkpoint again"
        )


def _flat(rows: Rows, expert: int, part: slice) -> tuple[Rows, int, int]:
    """Rows without experts, and which of them are the part."""
    per_expert = rows.shape[1]
    parts = tuple(replace(p, shape=(p.shape[0] * per_expert, *p.shape[2:])) for p in rows.parts)
    return Rows(parts), expert * per_expert + part.start, expert * per_expert + part.stop


def _weights(half: Half, expert: int, part: slice) -> np.ndarray:
    """Numbers [rows, inputs]."""
    if half.scales is not None:
        flat, start, stop = _flat(half.scales, expert, part)
        scales = _shaped(flat, start, stop)
        _check_scales(half.scales, scales, expert, expert + 1)
        return dequantise(_shaped(*_flat(half.weights, expert, part)), scales)
    flat, start, stop = _flat(half.weights, expert, part)
    numbers = flat.numbers(start, stop)
    return numbers.T if half.transposed else numbers


def _ggml_mxfp4(half: Half, expert: int, part: slice) -> Quantised:
    """A scale and 16 bytes of each block, which stay as they are but for their order."""
    flat, start, stop = _flat(half.weights, expert, part)
    stored = flat.raw(start, stop).reshape(stop - start, -1, 1 + BLOCK // 2)
    scales = np.ascontiguousarray(stored[..., 0])
    _check_scales(half.weights, scales, expert, expert + 1)
    blocks = stored[..., 1:]
    if MXFP4_OF_GGML[half.weights.parts[0].encoding]:
        blocks = pairs_of_halves(blocks)
    return Quantised(blocks, scales, 0.0, 0.0)
