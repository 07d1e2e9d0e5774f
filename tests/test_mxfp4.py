"""The quantiser to MXFP4 against a search of all codes, and on what was MXFP4 before."""

import ml_dtypes
import numpy as np
import pytest
from forms import FP4, dequantised, ggml_blocks

from osscompile.importer import mxfp4
from osscompile.importer.mxfp4 import dequantise, pairs_of_halves, quantise

RNG = np.random.default_rng(11)
TYPES = [ml_dtypes.bfloat16, np.float32]


def random_mxfp4(low: int, high: int, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    blocks = RNG.integers(0, 256, (rows, 5, 16), np.uint8)
    blocks[: rows // 2] &= 0x99  # of these the largest code is small: other scales hold them too
    return blocks, RNG.integers(low, high, (rows, 5)).astype(np.uint8)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("low", "high"), [(0, 12), (100, 130), (240, 252)])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_was_mxfp4_comes_back_bit_for_bit(
    dtype: type, low: int, high: int, transposed: bool
) -> None:
    """-0 too, and weights too small for arithmetic on their exponents."""
    blocks, scales = random_mxfp4(low, high)
    weights = dequantised(blocks, scales).astype(dtype)
    made = quantise(np.ascontiguousarray(weights.T).T if transposed else weights)
    found = dequantised(made.blocks, made.scales)
    np.testing.assert_array_equal(found.view(np.uint32), weights.astype(np.float32).view(np.uint32))
    assert made.changed == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1.0, 1e15])
def test_every_weight_becomes_the_nearest_code(dtype: type, scale: float) -> None:
    weights = (RNG.standard_normal((40, 96)) * scale).astype(dtype)
    made = quantise(weights)
    blocked = weights.astype(np.float64).reshape(40, 3, 32)
    grid = np.ldexp(FP4.astype(np.float64), made.scales[..., None, None].astype(int) - 127)
    nearest = np.abs(blocked[..., None] - grid).min(axis=-1)
    found = dequantised(made.blocks, made.scales).reshape(blocked.shape)
    np.testing.assert_allclose(np.abs(blocked - found), nearest, rtol=1e-6, atol=0)
    largest = np.abs(blocked).max(axis=-1) / np.ldexp(1.0, made.scales.astype(int) - 127)
    if scale > 1e-30:
        assert (largest <= mxfp4.LARGEST).all() and (largest > mxfp4.LARGEST / 2).all()
        error = np.sqrt(((found - blocked) ** 2).sum() / (blocked**2).sum())
        assert np.sqrt(made.changed / made.total) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_go_to_the_even_code(dtype: type) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    weights = np.zeros((1, 32), np.float32)
    weights[0, :8] = [6.0, *ties]
    weights[0, 8:16] = -weights[0, :8]
    made = quantise(weights.astype(dtype))
    found = dequantised(made.blocks, made.scales)[0]
    np.testing.assert_array_equal(found[1:8], [0, 1, 1, 2, 2, 4, 4])
    np.testing.assert_array_equal(found[8:16], -found[:8])


def test_float32_is_not_rounded_to_bfloat16_first() -> None:
    """Just above a tie, by less than bfloat16 can tell."""
    weights = np.zeros((1, 32), np.float32)
    weights[0, :3] = [6.0, np.nextafter(np.float32(2.5), 3), np.nextafter(np.float32(2.5), 2)]
    made = quantise(weights)
    np.testing.assert_array_equal(dequantised(made.blocks, made.scales)[0, 1:3], [3, 2])


def test_small_slabs_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = RNG.standard_normal((70, 160)).astype(ml_dtypes.bfloat16)
    monkeypatch.setattr(mxfp4, "MEASURED", 1)
    whole = quantise(weights)
    monkeypatch.setattr(mxfp4, "SLAB", 500)
    for order in (weights, np.ascontiguousarray(weights.T).T):
        parts = quantise(order)
        np.testing.assert_array_equal(parts.blocks, whole.blocks)
        np.testing.assert_array_equal(parts.scales, whole.scales)
        assert parts.changed == pytest.approx(whole.changed, rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_that_are_not_finite(dtype: type, value: float) -> None:
    weights = np.ones((3, 64), dtype)
    weights[1, 40] = value
    with pytest.raises(ValueError, match="not finite"):
        quantise(weights)


def test_blocks_of_zeros() -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[0, 32:] = -0.0
    made = quantise(weights)
    found = dequantised(made.blocks, made.scales)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(weights))
    assert not found.any() and made.total == 0


def test_dequantise_and_the_order_of_ggml() -> None:
    blocks, scales = random_mxfp4(0, 255)
    np.testing.assert_array_equal(dequantise(blocks, scales), dequantised(blocks, scales))
    ggml = ggml_blocks(blocks, scales).reshape(64, 5, 17)
    np.testing.assert_array_equal(pairs_of_halves(ggml[..., 1:]), blocks)
