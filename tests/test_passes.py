"""The passes: the pipeline, the faults that `verify` catches, choice and records of schedules, e^x.

`test_kernels_*.py` and the tests of whole models judge that the compiled result is right;
`test_golden_ir.py` shows what a change did to the IR.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from kernel_runner import Array, build
from smallest_graph import AVX2, PROFILES, SMALLEST, imported, kernels
from tvm import ir, relax, te, tirx
from tvm.relax import TensorType
from tvm.tirx import PrimFunc
from tvm_ffi import structural_equal, structural_walk

from osscompile.importer.graph import TOKENS, build_graph
from osscompile.importer.synthetic import gpt_oss_config
from osscompile.kernels import attention, experts, matmul, rows
from osscompile.passes import SHARED_PASSES, VARIANT_PASSES, run_passes
from osscompile.passes.expand_exp import expand_exp
from osscompile.passes.pack_weights import PACKED_ROWS, pack_weights
from osscompile.passes.schedule_kernels import schedule_kernels
from osscompile.passes.verify import verify
from osscompile.runtime.step import FUNCTIONS
from osscompile.schedules import records
from osscompile.schedules.cpu import CPU_RULES
from osscompile.schedules.cpu import rows as fallback
from osscompile.schedules.cpu.loops import loops
from osscompile.schedules.formats import is_few
from osscompile.schedules.records import kernel_key, recorded
from osscompile.schedules.rule import schedule
from osscompile.targets import Target, TargetError

# --- The pipeline -----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_pipeline_dumps_every_phase_and_leaves_calls_of_the_machine_only(
    profile: str, tmp_path: Path
) -> None:
    packed = run_passes(imported(profile), AVX2, SHARED_PASSES, tmp_path)
    module = run_passes(packed, AVX2, VARIANT_PASSES, tmp_path, after=SHARED_PASSES)
    phases = ["imported", *(p.__name__ for p in (*SHARED_PASSES, *VARIANT_PASSES))]
    files = [f"{i}_{phase}.py" for i, phase in enumerate(phases)]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    left = [
        str(call.op)
        for name in FUNCTIONS
        for call in _calls(module[name])
        if isinstance(call.op, ir.Op) and call.op.name.startswith("relax.call_tir")
    ]
    assert not left


def test_pack_weights_packs_all_whose_rows_fill_vectors_and_no_others() -> None:
    """The router's 2 rows do not fill vectors, and the embedding is looked up by row."""
    packed = pack_weights(imported("fast"), AVX2).attrs[PACKED_ROWS]
    parts = {"qkv", "out", "gate_up", "down"}
    names = {f"layers.{i}.{part}.{kind}" for i in (0, 1) for part in parts for kind in WEIGHT}
    assert set(packed) == names | {"lm_head.words", "lm_head.scales"}


def test_pack_weights_gives_parameters_the_shapes_of_their_layout() -> None:
    graph = build_graph(SMALLEST, "fast", 32, 16)
    module = pack_weights(graph.module, AVX2)
    shapes = {p.name: p.shape for p in graph.weights}
    for name in FUNCTIONS:
        for parameter in module[name].params:
            if parameter.name in module.attrs[PACKED_ROWS]:
                axis, lanes = (int(i) for i in module.attrs[PACKED_ROWS][parameter.name])
                shape = list(shapes[parameter.name])
                shape[axis] //= lanes
                assert [int(e) for e in parameter.ty.shape] == [*shape, lanes], parameter.name


WEIGHT = ("words", "scales")


def _calls(node: Any) -> list[ir.Call]:
    calls: list[ir.Call] = []
    structural_walk(node, (ir.Call, calls.append))
    return calls


# --- Faults that verify catches ---------------------------------------------------------------


def kernel_of(value: Callable[[te.Tensor, Any], Any], dtype: str = "float32") -> PrimFunc:
    """Return a kernel for out[i] = value(x, i), with 64 numbers."""
    x = te.placeholder((64,), dtype, name="x")
    out = te.compute((64,), lambda i: value(x, i), name="out")
    return te.create_prim_func([x, out]).with_attr("op", "test").without_attr("global_symbol")


def alone(kernel: PrimFunc) -> ir.IRModule:
    return ir.IRModule({"kernel": kernel})


def copy(x: te.Tensor, i: Any) -> Any:
    return x[i]


def test_verify_accepts_a_kernel_without_faults() -> None:
    """Otherwise the tests below would pass for another reason."""
    verify(alone(kernel_of(copy)), AVX2, ())
    scheduled = schedule_kernels(alone(kernel_of(copy)), AVX2)
    verify(scheduled, AVX2, ("pack_weights", "schedule_kernels"))


def test_verify_catches_an_unscheduled_kernel() -> None:
    with pytest.raises(AssertionError, match="kernel: not scheduled"):
        verify(alone(kernel_of(copy)), AVX2, ("pack_weights", "schedule_kernels"))


def test_verify_catches_a_kernel_that_no_schedule_can_recognise() -> None:
    with pytest.raises(AssertionError, match="kernel: no `op`"):
        verify(alone(kernel_of(copy).without_attr("op")), AVX2, ())


def test_verify_catches_a_dtype_that_the_target_cannot_hold() -> None:
    with pytest.raises(AssertionError, match="x is float64, which x86 cannot hold"):
        verify(alone(kernel_of(copy, "float64")), AVX2, ())
    without_bytes = dataclasses.replace(AVX2, dtypes=("float32", "int32"))
    with pytest.raises(AssertionError, match="cannot hold"):
        verify(imported("fast"), without_bytes, ())


def test_verify_catches_an_unbound_symbol() -> None:
    stray = tirx.Var("stray", "float32")
    kernel = kernel_of(copy)
    kernel = kernel.with_body(tirx.SeqStmt([kernel.body, tirx.Evaluate(stray + 1.0)]))
    with pytest.raises(AssertionError, match="kernel: stray used"):
        verify(alone(kernel), AVX2, ())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 65), "float32"), ((1, 1, 64), "float32"), ((1, 64), "float16")]
)
def test_verify_catches_a_call_that_disagrees_with_its_kernel(
    shape: tuple[int, ...], dtype: str
) -> None:
    def caller(shape: tuple[int, ...], dtype: str) -> ir.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", TensorType(shape, dtype))
        weight = relax.Var("weight", TensorType((64,), "float32"))
        with builder.function("decode", [x, weight], pure=False):
            kernel = builder.add_func(rows.rms_norm(1, 64, 1e-5), "rms_norm")
            out = TensorType((1, 64), "float32")
            builder.emit_func_output(builder.emit(relax.call_tir(kernel, [x, weight], out)))
        return builder.get()

    verify(caller((1, 64), "float32"), AVX2, ())
    with pytest.raises(ValueError, match="Argument 0 type mismatch"):
        verify(caller(shape, dtype), AVX2, ())


# --- The choice of schedules ------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_last_rule_takes_every_kernel_made_of_blocks(profile: str) -> None:
    assert CPU_RULES[-1] is fallback
    module = pack_weights(imported(profile), AVX2)
    for name, kernel in kernels(module).items():
        if loops(kernel, AVX2, recorded(kernel, AVX2)) is None:
            assert fallback(kernel, AVX2, recorded(kernel, AVX2)) is not None, name


def test_loops_take_every_kernel_that_is_not_made_of_blocks() -> None:
    for kernel in (
        attention.attention(TOKENS, 4, 2, 16, None, "float32"),
        experts.sort_by_expert(TOKENS, 8, 4),
    ):
        assert loops(kernel, AVX2, recorded(kernel, AVX2)) is not None
    kernel = rows.rms_norm(1, 64, 1e-5)
    assert loops(kernel, AVX2, recorded(kernel, AVX2)) is None


@pytest.mark.parametrize("profile", PROFILES)
def test_no_matrix_product_of_gpt_oss_falls_back(profile: str) -> None:
    module = build_graph(gpt_oss_config(num_layers=1, num_experts=32), profile, 4096, 512).module
    module = pack_weights(module, AVX2)
    products = [k for k in kernels(module).values() if _is_product(k)]
    assert len(products) >= 15  # qkv, out, router, gate_up and down, each in three forms
    for kernel in products:
        in_int8 = "xq" in {parameter.name for parameter in kernel.params}
        rule = "panel"
        if is_few(kernel.params[0].shape[0]):
            rule = "few" if in_int8 else "matvec"
        assert schedule(kernel, AVX2).attrs["scheduled_by"] == rule, kernel.attrs["op"]


def _is_product(kernel: PrimFunc) -> bool:
    return str(kernel.attrs["op"]).startswith(("dense", "moe"))


def test_schedule_of_an_unknown_family_names_those_that_there_are() -> None:
    with pytest.raises(TargetError, match="cpu, gpu, found 'abacus'"):
        schedule(rows.rms_norm(1, 64, 1e-5), dataclasses.replace(AVX2, family="abacus"))


# --- Records of tuning ------------------------------------------------------------------------

KERNEL = matmul.dense_bf16(1, 32, 8 * 24, False, False)


@pytest.fixture
def write_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes a target's records where the module that reads them looks."""
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    records._records.cache_clear()

    def write(target: Target, found: dict[str, dict[str, int]]) -> None:
        records.records_file(target).write_text(json.dumps(found))
        records._records.cache_clear()

    yield write
    records._records.cache_clear()


def _parallel_extents(function: PrimFunc) -> list[int]:
    extents: list[int] = []

    def collect(loop: tirx.For) -> None:
        if loop.kind == tirx.ForKind.PARALLEL:
            extents.append(int(loop.extent))

    structural_walk(function.body, (tirx.For, collect))
    return extents


def test_kernel_without_a_record_gets_the_default(write_records: Any) -> None:
    assert recorded(KERNEL, AVX2)("unroll", (1, 2), 1) == 1


def test_record_answers_for_its_kernel_and_target_alone(write_records: Any) -> None:
    write_records(AVX2, {kernel_key(KERNEL): {"unroll": 2}, "another kernel": {"depth": 2}})
    choose = recorded(KERNEL, AVX2)
    assert choose("unroll", (1, 2), 1) == 2
    assert choose("depth", (1, 2), 1) == 1
    assert recorded(KERNEL, dataclasses.replace(AVX2, name="other"))("unroll", (1, 2), 1) == 1


def test_record_that_is_no_candidate_any_more_is_ignored(write_records: Any) -> None:
    write_records(AVX2, {kernel_key(KERNEL): {"unroll": 3}})
    assert recorded(KERNEL, AVX2)("unroll", (1, 2), 1) == 1


def test_kernel_key_tells_operations_shapes_and_dtypes_apart() -> None:
    keys = {
        kernel_key(kernel)
        for kernel in (
            matmul.dense_bf16(1, 32, 64, False, False),
            matmul.dense_bf16(1, 64, 32, False, False),
            matmul.dense_bf16(TOKENS, 32, 64, False, False),
            matmul.dense_bf16(1, 32, 64, True, False),
            matmul.moe_mxfp4_swiglu("q8", 1, 4, 32, 64, 7.0),
            matmul.moe_mxfp4_swiglu("digits", 1, 4, 32, 64, 7.0),
            attention.attention(1, 4, 2, 64, None, "float16"),
            attention.attention(1, 4, 2, 64, 128, "float16"),
        )
    }
    assert len(keys) == 8


def test_record_changes_the_schedule_but_not_the_result(
    this_machine: Target, write_records: Any
) -> None:
    x = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    ones = np.full((8 * 24, 32), 0x3F80, np.uint16)  # 1.0

    def run(target: Target) -> tuple[list[int], Array]:
        built = build(KERNEL, target)
        return _parallel_extents(built.function), built(x, ones)

    default_extents, default = run(this_machine)
    (packed,) = kernels(pack_weights(_calling(KERNEL), this_machine)).values()
    write_records(this_machine, {kernel_key(packed): {"row_groups_per_task": 4}})
    again = dataclasses.replace(this_machine, description="not built before")
    extents, result = run(again)
    groups = 8 * 24 // this_machine.vector_lanes
    assert extents == [groups // 4] != default_extents
    np.testing.assert_allclose(result, np.full_like(result, x.astype(np.float64).sum()), rtol=1e-5)
    np.testing.assert_array_equal(result, default)


def _calling(kernel: PrimFunc) -> ir.IRModule:
    builder = relax.BlockBuilder()
    types = [TensorType([int(e) for e in p.shape], str(p.dtype)) for p in kernel.params]
    arguments = [relax.Var(p.name, ty) for p, ty in zip(kernel.params, types[:-1], strict=False)]
    with builder.function("decode", arguments, pure=False):
        name = builder.add_func(kernel, str(kernel.attrs["op"]))
        builder.emit_func_output(builder.emit(relax.call_tir(name, arguments, types[-1])))
    return builder.get()


# --- e^x --------------------------------------------------------------------------------------


def run_exp(x: Array, target: Target) -> Array:
    target = dataclasses.replace(target, has_exp=False)
    placeholder = te.placeholder(x.shape, "float32", name="x")
    out = te.compute(x.shape, lambda i: tirx.exp(placeholder[i]), name="out")
    function = te.create_prim_func([placeholder, out])
    module = expand_exp(ir.IRModule({"main": function}), target)
    result = tvm.runtime.tensor(np.full(x.shape, np.nan, np.float32))
    tvm.compile(module, target=tvm.target.Target(target.tvm))(tvm.runtime.tensor(x), result)
    return result.numpy()


def test_expanded_exp_is_off_by_2_units_at_most(this_machine: Target) -> None:
    halves = (np.arange(-126, 127) + 0.5) * np.log(2)  # where the power of two changes
    near = (halves[:, None] * (1 + np.arange(-8, 9) * 2.0**-24)).reshape(-1)
    x = np.concatenate([np.linspace(-87, 88, 400001), near, [0.0, -0.0, 1e-30, -1e-30]])
    x = x.astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    error = np.abs(run_exp(x, this_machine) / expected - 1)
    assert error.max() < 2.5e-7


def test_expanded_exp_of_hidden_scores_is_nearly_0(this_machine: Target) -> None:
    x = np.array([-87.5, -100, -1e4, -1e30, -3.4e38, -np.inf], np.float32)
    result = run_exp(x, this_machine)
    assert (result > 0).all() and (result < 2e-38).all()


def test_exp_stays_where_the_target_has_an_instruction() -> None:
    kernel = kernel_of(lambda x, i: tirx.exp(x[i]))
    with_exp = dataclasses.replace(AVX2, has_exp=True)
    assert structural_equal(expand_exp(alone(kernel), with_exp)["kernel"], kernel)
    expanded = expand_exp(alone(kernel), AVX2)["kernel"]
    names = {call.op.name for call in _calls(expanded.body) if isinstance(call.op, ir.Op)}
    assert "tirx.exp" not in names and "tirx.floor" in names
