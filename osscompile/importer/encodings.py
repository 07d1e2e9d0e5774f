"""What stored bytes mean: numbers by themselves, and ggml's blocks of quantised numbers.

Every decoder takes blocks [n, bytes] uint8 and returns [n, numbers] float32 (bfloat16 of BF16).
The blocks are those of ggml-common.h; in most of them numbers of low bits fill a run before those
of the next bits, which `_unpack` takes apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .mxfp4 import FP4_VALUES

# What the codes of IQ4_NL and IQ4_XS stand for.
IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


@dataclass(frozen=True)
class Encoding:
    """`numbers` of them take `num_bytes`; `lossy`: an original was rounded to get here."""

    numbers: int
    num_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]
    lossy: bool = True


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of each block, [n, 1] float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _unpack(data: np.ndarray, bits: int, run: int) -> np.ndarray:
    """[n, m] uint8 -> [n, m * 8 / bits] uint8: from each run of bytes the lowest bits of all, then
    the next of all."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = data.reshape(len(data), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return parts.reshape(len(data), -1)


def _scaled(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes [n, numbers] times scales [n, groups]: each scale for its share of the numbers."""
    grouped = codes.astype(np.float32).reshape(*scales.shape, -1)
    grouped *= scales[..., None]
    return grouped.reshape(len(codes), -1)


def _shifted(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    grouped = _scaled(codes, scales).reshape(*minima.shape, -1)
    grouped += minima[..., None]
    return grouped.reshape(len(codes), -1)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(ml_dtypes.bfloat16)


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4")


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _scaled(_unpack(blocks[:, 2:], 4, 16).view(np.int8) - 8, _half(blocks, 0))


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _shifted(_unpack(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    codes = _unpack(blocks[:, 6:], 4, 16) | _unpack(blocks[:, 2:6], 1, 1) << 4
    return _scaled(codes.view(np.int8) - 16, _half(blocks, 0))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    codes = _unpack(blocks[:, 8:], 4, 16) | _unpack(blocks[:, 4:8], 1, 1) << 4
    return _shifted(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _scaled(blocks[:, 2:].view(np.int8), _half(blocks, 0))


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scales, lows = blocks[:, :16] & 15, blocks[:, :16] >> 4
    codes = _unpack(blocks[:, 16:80], 2, 32)
    return _shifted(codes, _half(blocks, 80) * scales, -_half(blocks, 82) * lows)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    low = _unpack(blocks[:, 96:104], 4, 8)
    high = _unpack(blocks[:, 104:108], 2, 4)
    scales = (low | high << 4).view(np.int8) - 32
    codes = _unpack(blocks[:, 32:96], 2, 32) | _unpack(blocks[:, :32], 1, 32) << 2
    return _scaled(codes.view(np.int8) - 4, _half(blocks, 108) * scales)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight of each in Q4_K and Q5_K: six bits of twelve bytes times the two halves before them."""
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _shifted(_unpack(blocks[:, 16:], 4, 32), *_scales_and_minima(blocks))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    codes = _unpack(blocks[:, 48:], 4, 32) | _unpack(blocks[:, 16:48], 1, 32) << 4
    return _shifted(codes, *_scales_and_minima(blocks))


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    codes = _unpack(blocks[:, :128], 4, 64) | _unpack(blocks[:, 128:192], 2, 32) << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _scaled(codes.view(np.int8) - 32, scales)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _scaled(IQ4_VALUES[_unpack(blocks[:, 2:], 4, 16)], _half(blocks, 0))


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    low = _unpack(blocks[:, 4:8], 4, 1)
    high = _unpack(blocks[:, 2:4], 2, 1)
    scales = (low | high << 4).view(np.int8) - 32
    return _scaled(IQ4_VALUES[_unpack(blocks[:, 8:], 4, 16)], _half(blocks, 0) * scales)


def _mxfp4(codes: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    scales = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 127)
    return _scaled(FP4_VALUES[codes], scales)


def _mxfp4_halves(blocks: np.ndarray) -> np.ndarray:
    return _mxfp4(_unpack(blocks[:, 1:], 4, 16), blocks)


def _mxfp4_pairs(blocks: np.ndarray) -> np.ndarray:
    return _mxfp4(_unpack(blocks[:, 1:], 4, 1), blocks)


# By the name in a safetensors header, or in ggml. U8 stands for packed MXFP4, and is never decoded.
ENCODINGS = {
    "U8": Encoding(1, 1, lambda blocks: blocks, lossy=False),
    "BF16": Encoding(1, 2, _bf16, lossy=False),
    "F16": Encoding(1, 2, _f16, lossy=False),
    "F32": Encoding(1, 4, _f32, lossy=False),
    "Q8_0": Encoding(32, 34, _q8_0, lossy=False),  # so little that nobody needs to be told
    "MXFP4": Encoding(32, 17, _mxfp4_halves, lossy=False),
    "MXFP4 in pairs": Encoding(32, 17, _mxfp4_pairs, lossy=False),
    "Q4_0": Encoding(32, 18, _q4_0),
    "Q4_1": Encoding(32, 20, _q4_1),
    "Q5_0": Encoding(32, 22, _q5_0),
    "Q5_1": Encoding(32, 24, _q5_1),
    "Q2_K": Encoding(256, 84, _q2_k),
    "Q3_K": Encoding(256, 110, _q3_k),
    "Q4_K": Encoding(256, 144, _q4_k),
    "Q5_K": Encoding(256, 176, _q5_k),
    "Q6_K": Encoding(256, 210, _q6_k),
    "IQ4_NL": Encoding(32, 18, _iq4_nl),
    "IQ4_XS": Encoding(256, 136, _iq4_xs),
}
