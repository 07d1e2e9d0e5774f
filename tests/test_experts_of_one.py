"""The three kernels of one token's experts: against the kernels that they join, which other tests
judge, and with logits that are equal, huge, or no numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from cuda_device import H100
from kernel_cases import HERE, LIMIT, assert_close, bf16_bits, int32, mxfp4_weights, numbers
from kernel_runner import Array, build
from metal_device import needs_gxx
from smallest_graph import imported
from tvm.tirx import PrimFunc

from osscompile.codegen.cuda import cuda_source
from osscompile.codegen.programs import build_programs
from osscompile.importer.weights import mxfp4_words
from osscompile.kernels import experts, matmul, rows
from osscompile.passes import LAUNCH_PASSES, SHARED_PASSES, run_passes
from osscompile.passes.join_experts import Joined, join_kernels

pytestmark = needs_gxx
EPS = 1e-5
LOGITS = {
    "spread": lambda count: numbers(7, count, scale=2.0),
    "equal": lambda count: np.zeros(count),
    "both_zeros": lambda count: np.resize([0.0, -0.0], count),
    "the_last": lambda count: np.arange(count) / 8,
    "no_numbers": lambda count: np.resize([np.nan, 1, -np.nan], count),
    "infinite": lambda count: np.resize([-np.inf, np.inf, 1], count),
    "all_infinite": lambda count: np.full(count, -np.inf),
}


@dataclass(frozen=True)
class Experts:
    """A token's experts: the kernels that are joined, and what they take."""

    num_experts: int = 8
    top_k: int = 4
    hidden: int = 64
    inner: int = 96

    def kernels(self) -> tuple[PrimFunc, PrimFunc, PrimFunc, PrimFunc]:
        count, top_k, hidden, inner = self.num_experts, self.top_k, self.hidden, self.inner
        return (
            rows.rms_norm_quantized("q8", 1, hidden, EPS),
            matmul.route_bf16(1, hidden, count, top_k),
            matmul.moe_mxfp4_swiglu("q8", top_k, count, hidden, inner, LIMIT),
            matmul.moe_mxfp4_sum("q8", 1, top_k, count, inner, hidden, top_k),
        )

    def joined(self) -> Joined:
        return join_kernels(*self.kernels())

    def norm_and_router(self) -> tuple[Array, ...]:
        shape = (self.num_experts, self.hidden)
        router = bf16_bits(3, *shape, scale=self.hidden**-0.5)
        return numbers(1, 1, self.hidden), numbers(2, self.hidden), router, numbers(4, shape[0])

    def gate_up(self) -> tuple[Array, ...]:
        shape = (self.num_experts, 2, self.inner)
        blocks, scales = mxfp4_weights(5, self.hidden, *shape)
        return mxfp4_words(blocks), scales, numbers(6, *shape)

    def down(self) -> tuple[Array, ...]:
        shape = (self.num_experts, self.hidden)
        blocks, scales = mxfp4_weights(8, self.inner, *shape)
        return mxfp4_words(blocks), scales, numbers(9, *shape)


SIZES = [
    Experts(),
    Experts(num_experts=32, hidden=2880, inner=32),
    Experts(num_experts=128, hidden=96, inner=1056),
    Experts(num_experts=5, top_k=1, hidden=64, inner=64),
    Experts(num_experts=4, top_k=4, hidden=32, inner=2880),
]
every_size = pytest.mark.parametrize("of", SIZES, ids=repr)


@every_size
def test_norm_and_router(of: Experts) -> None:
    norm, route, _, _ = of.kernels()
    x, weight, router, bias = of.norm_and_router()
    normed, *quantized = build(norm, HERE)(x, weight)
    logits, *_ = build(route, HERE)(normed, router, bias)
    *found, found_logits = build(of.joined().route, H100)(x, weight, router, bias)
    assert_close(found_logits, logits)
    np.testing.assert_allclose(found[1], quantized[1], rtol=1e-6)
    assert np.abs(found[0].astype(int) - quantized[0]).max() <= 1
    np.testing.assert_array_equal(found[2], 12 * found[0].astype(np.int32).sum(axis=-1))


def chosen(of: Experts, kind: str) -> tuple[Array, Array, Array]:
    """Return logits, and the experts and weights that the router's own kernel makes of them."""
    logits = np.asarray(LOGITS[kind](of.num_experts), np.float32)[None]
    weight = np.zeros((of.num_experts, of.hidden), np.uint16)
    x = np.zeros((1, of.hidden), np.float32)
    _, _, ids, weights = build(of.kernels()[1], HERE)(x, weight, logits[0])
    return logits, ids, weights


def quantized_rows(count: int, inputs: int) -> tuple[Array, ...]:
    rng = np.random.default_rng(count)
    whole = rng.integers(-127, 128, (count, inputs // 32, 32)).astype(np.int8)
    scales = rng.uniform(0.01, 0.03, whole.shape[:2]).astype(np.float32)
    return whole, scales, 12 * whole.astype(np.int32).sum(axis=-1, dtype=np.int32)


@every_size
@pytest.mark.parametrize("kind", ["spread", "the_last"])
def test_gate_up_and_swiglu(of: Experts, kind: str) -> None:
    check_swiglu(of, kind)


@pytest.mark.parametrize("kind", LOGITS)
def test_gate_up_and_swiglu_of_any_logits(kind: str) -> None:
    check_swiglu(SIZES[0], kind)


def check_swiglu(of: Experts, kind: str) -> None:
    logits, ids, _ = chosen(of, kind)
    token, weights = quantized_rows(1, of.hidden), of.gate_up()
    gathered = [np.repeat(tensor, of.top_k, axis=0) for tensor in token]
    out, _, scales, _ = build(of.kernels()[2], HERE)(*gathered, *weights, ids[0])
    whole, found_scales, offsets = build(of.joined().swiglu, H100)(*token, *weights, logits)
    np.testing.assert_allclose(found_scales, scales, rtol=1e-5)
    error = np.abs(whole * found_scales[..., None] - out.reshape(whole.shape))
    assert (error <= 0.501 * scales[..., None] + 1e-5).all()
    np.testing.assert_array_equal(offsets, 12 * whole.astype(np.int32).sum(axis=-1))


@every_size
def test_down_and_sum(of: Experts) -> None:
    check_sum(of, "spread")


@pytest.mark.parametrize("kind", ["equal", "both_zeros", "the_last"])
def test_down_and_sum_of_any_logits(kind: str) -> None:
    check_sum(SIZES[0], kind)


def check_sum(of: Experts, kind: str) -> None:
    logits, ids, weights = chosen(of, kind)
    activations, residual = quantized_rows(of.top_k, of.inner), numbers(10, 1, of.hidden)
    slots = np.arange(of.top_k, dtype=np.int32)[None]
    rest = (ids[0], slots, weights, residual)
    _, expected = build(of.kernels()[3], HERE)(*activations, *of.down(), *rest)
    found = build(of.joined().total, H100)(*activations, *of.down(), logits, residual)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", ["no_numbers", "infinite", "all_infinite"])
def test_a_broken_router_shows(kind: str) -> None:
    """Its sum is no number, and no address is formed beyond the experts."""
    of = SIZES[0]
    logits, *_ = chosen(of, kind)
    activations, residual = quantized_rows(of.top_k, of.inner), numbers(10, 1, of.hidden)
    assert np.isnan(
        build(of.joined().total, H100)(*activations, *of.down(), logits, residual)
    ).all()


def test_the_joined_kernels_without_a_schedule() -> None:
    """They are what the kernels are one after the other; rows are in the order of choice."""
    of = SIZES[0]
    joined = of.joined()
    logits, ids, weights = chosen(of, "spread")
    assert list(ids[0]) != sorted(ids[0])
    x, weight, router, bias = of.norm_and_router()
    *token, found = build(joined.route, HERE, scheduled=False)(x, weight, router, bias)
    assert_close(found, build(joined.route, H100)(x, weight, router, bias)[-1])
    act = build(joined.swiglu, HERE, scheduled=False)(*token, *of.gate_up(), logits)
    rows = [np.repeat(tensor, of.top_k, axis=0) for tensor in token]
    _, *expected = build(of.kernels()[2], HERE)(*rows, *of.gate_up(), ids[0])
    for ours, theirs in zip(act, expected, strict=True):
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=1e-5, atol=1)
    residual, slots = numbers(10, 1, of.hidden), np.arange(of.top_k, dtype=np.int32)[None]
    sums = build(joined.total, HERE, scheduled=False)(*act, *of.down(), logits, residual)
    rest = (ids[0], slots, weights, residual)
    _, expected_sums = build(of.kernels()[3], HERE)(*act, *of.down(), *rest)
    assert_close(sums, expected_sums)


def test_rows_of_one_and_repeated_rows() -> None:
    found = build(experts.rows_of_one(4), HERE, scheduled=False)(int32(7, 0, 3, 2)[None])
    np.testing.assert_array_equal(found[0], [7, 0, 3, 2])
    np.testing.assert_array_equal(found[1], [[0, 1, 2, 3]])
    token = quantized_rows(1, 64)
    for tensor, repeated in zip(
        token, build(experts.repeat_row(4, 64), HERE, scheduled=False)(*token), strict=True
    ):
        np.testing.assert_array_equal(repeated, np.repeat(tensor, 4, axis=0))


def test_only_one_token_of_the_profile_fast_has_them() -> None:
    """Several rows share experts, so theirs are sorted; products of digits stay as they are."""
    for profile, joined in (("fast", {"step_1"}), ("exact", set())):
        module = run_passes(imported(profile), H100, SHARED_PASSES + LAUNCH_PASSES)
        programs = build_programs(module)
        for name, program in programs.items():
            kernels = {launch.kernel for launch in program.launches}
            assert ("moe_mxfp4_sum_step_q8_kernel" in kernels) == (name in joined)
            sorts = any(kernel.startswith(("sort_by_expert", "gather_rows")) for kernel in kernels)
            assert sorts == (name not in joined)


def test_room_for_several_work_groups() -> None:
    """What a kernel asks for is what its bounds say; others have a processor for themselves."""
    module = run_passes(imported("fast"), H100, SHARED_PASSES + LAUNCH_PASSES)
    source = cuda_source(module, H100)
    assert "__launch_bounds__(256, 3) moe_mxfp4_swiglu_step_q8_kernel(" in source
    assert re.search(r"__launch_bounds__\(\d+, 1\) route_step_q8_kernel\(", source)
