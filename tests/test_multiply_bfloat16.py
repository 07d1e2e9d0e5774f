"""The pass that multiplies many rows as bfloat16 changes the functions for several rows, on targets
that have such units, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from cuda_device import H100
from smallest_graph import AVX2, imported, kernels
from tvm import ir, relax
from tvm.tirx import PrimFunc
from tvm_ffi import structural_equal

from osscompile.passes.multiply_bfloat16 import multiply_bfloat16
from osscompile.passes.pack_weights import pack_weights
from osscompile.passes.verify import verify
from osscompile.targets import Target


def rewritten(profile: str) -> tuple[ir.IRModule, ir.IRModule]:
    """Return the smallest graph before and after."""
    module = pack_weights(imported(profile), H100)
    return module, multiply_bfloat16(module, H100)


def called(module: ir.IRModule, function: str) -> list[PrimFunc]:
    found = []
    for block in module[function].body.blocks:
        for binding in block.bindings:
            if getattr(binding.value, "op", None) == ir.Op.get("relax.call_tir"):
                found.append(module[binding.value.args[0]])
    return found


@pytest.mark.parametrize("function", ["step", "step_4", "step_8"])
def test_no_kernel_for_several_rows_takes_int8(function: str) -> None:
    _, module = rewritten("fast")
    verify(module, H100, ("pack_weights", "multiply_bfloat16"))
    ops = [str(kernel.attrs["op"]) for kernel in called(module, function)]
    assert {"dense_int8_bf16", "moe_mxfp4_swiglu_bf16", "moe_mxfp4_sum_bf16"} < set(ops)
    assert "gather_rows" not in ops and "quantize_q8" not in ops
    for kernel in called(module, function):
        assert all(str(p.dtype) != "int8" for p in kernel.params), kernel.attrs["op"]


def test_numbers_that_only_became_panels_are_no_result() -> None:
    """The router reads the norm before the experts; nobody reads that before attention."""
    _, module = rewritten("fast")
    norms = [k for k in called(module, "step") if k.attrs["op"] == "rms_norm_bf16"]
    results = [[p.name for p in kernel.params if p.name in ("out", "xb")] for kernel in norms]
    layer = [["xb"], ["out", "xb"]]
    assert results == [*layer, *layer, ["xb"]]
    (swiglu, _) = (k for k in called(module, "step") if k.attrs["op"] == "moe_mxfp4_swiglu_bf16")
    names = ["xb", "row_token", "words", "scales", "bias", "row_expert", "xb_out"]
    assert [p.name for p in swiglu.params] == names


@pytest.mark.parametrize("function", ["step_1", "step_2"])
def test_functions_for_one_row_and_for_two_stay(function: str) -> None:
    before, after = rewritten("fast")
    pairs = zip(called(before, function), called(after, function), strict=True)
    assert all(structural_equal(a, b) for a, b in pairs)


def test_kernels_that_nobody_calls_go() -> None:
    _, module = rewritten("fast")
    names = {f for f, value in module.functions_items() if isinstance(value, relax.Function)}
    used = [kernel for f in names for kernel in called(module, f.name_hint)]
    others = [k for k in kernels(module).values() if k.attrs["op"] != "append_kv"]
    assert all(any(structural_equal(kernel, k) for k in used) for kernel in others)


def test_exact_stays() -> None:
    before, after = rewritten("exact")
    assert structural_equal(before, after)


@pytest.mark.parametrize(
    "target", [AVX2, dataclasses.replace(H100, bf16_matrix=None)], ids=["avx2", "gpu"]
)
def test_targets_without_such_units_stay(target: Target) -> None:
    module = pack_weights(imported("fast"), target)
    assert multiply_bfloat16(module, target) is module
