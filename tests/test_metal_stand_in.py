"""The stand-in for Metal takes what Metal takes, and finds errors that Metal would not forgive."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from metal_device import check_compiles, load_stand_in, needs_gxx, reset


@needs_gxx
@pytest.mark.parametrize(
    ("expression", "compiles"),
    [
        ("rint(out[0])", True),
        ("nearbyint(out[0])", False),
        ("exp(1)", False),
        ("min(out[0], 1)", False),
        ("simd_shuffle(out[0], 40)", False),
    ],
)
def test_what_metal_does_not_have_does_not_compile(
    expression: str, compiles: bool, tmp_path: Path
) -> None:
    result = check_compiles({"f": kernel(f"out[0] = {expression};")}, tmp_path)
    assert (result.returncode == 0) == compiles, result.stderr


def kernel(body: str) -> str:
    indices = "uint blockIdx [[ a ]], uint threadIdx [[ a ]]"
    return (
        "#include <metal_stdlib>\nusing namespace metal;\n"
        f"kernel void f(device float* out [[ buffer(0) ]], {indices}) {{\n  {body}\n}}\n"
    )


def run_kernel(body: str, threads: int) -> list[float]:
    """Run a kernel that fills out[threads] in one threadgroup."""
    load_stand_in()

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    handle = struct.pack("<QBBH", 1, 3, 64, 1)  # types of arguments
    information = text("f") + handle + struct.pack("<Q", 1) + text("threadIdx.x")
    information += struct.pack("<Q", 0)
    one = struct.pack("<Q", 1) + text("f")
    module = text("metal") + one + information + one + text(kernel(body))
    loaded = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.metal")(module)
    out = tvm.runtime.empty((threads,), "float32", tvm.runtime.device("metal"))
    try:
        loaded["f"](ctypes.c_void_p(out.data_ptr()), threads)
        values: list[float] = out.numpy().tolist()
    finally:
        reset()
    return values


@needs_gxx
def test_threads_wait_for_each_other() -> None:
    body = """threadgroup float last[1];
  if (threadIdx == 39) { last[0] = 7.0f; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[threadIdx] = last[0];"""
    assert run_kernel(body, 40) == [7.0] * 40


@needs_gxx
@pytest.mark.parametrize("turn", ["forwards", "backwards"])
def test_barrier_that_is_missing(turn: str) -> None:
    """A threadgroup's memory begins as NaN, and its threads start at either end by turns."""
    body = """threadgroup float x[40];
  x[threadIdx] = 1.0f;
  out[threadIdx] = x[39 - threadIdx];"""
    assert np.isnan(run_kernel(body, 40)).sum() == 20


@needs_gxx
def test_lanes_that_give_nothing_are_not_a_number() -> None:
    """These are lanes beyond a SIMD-group of 32, and lanes that do not take part."""
    body = """out[threadIdx] = -1.0f;
  if (threadIdx % 4 != 2) { out[threadIdx] = simd_shuffle_down((float)threadIdx, 1); }"""
    found = run_kernel(body, 40)
    for i, value in enumerate(found):
        if i % 4 == 2:
            assert value == -1
        elif i % 4 == 1 or i in (31, 39):
            assert np.isnan(value)
        else:
            assert value == i + 1


MULTIPLY = """threadgroup float a[72];
  threadgroup float sums[64];
  a[threadIdx] = threadIdx; a[32 + threadIdx] = 32 + threadIdx;
  if (threadIdx < 8) { a[64 + threadIdx] = 64 + threadIdx; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_float8x8 m[3];
  simdgroup_load(m[0], a, 9, 0, false);
  simdgroup_load(m[1], a + 1, 8, 0, true);
  m[2] = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);
  simdgroup_multiply_accumulate(m[2], m[0], m[1], m[2]);
  simdgroup_store(m[2], sums, 8, 0, false);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[threadIdx] = sums[threadIdx] + 1000000.0f * sums[63 - threadIdx];"""


@needs_gxx
def test_matrices_of_a_simd_group() -> None:
    a = np.arange(72.0)
    product = a.reshape(8, 9)[:, :8] @ a[1:65].reshape(8, 8).T + 0.5
    expected = (product.ravel() + 1e6 * product.ravel()[::-1])[:32]
    np.testing.assert_allclose(run_kernel(MULTIPLY, 32), expected, rtol=1e-6)


@needs_gxx
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("turn", ["forwards", "backwards"])
def test_barrier_that_is_missing_beside_matrices(which: int, turn: str) -> None:
    """The barrier is missing before matrices are loaded, or after they are stored."""
    barrier = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    parts = MULTIPLY.split(barrier)
    body = [parts[0] + parts[1] + barrier + parts[2], parts[0] + barrier + parts[1] + parts[2]]
    assert np.isnan(run_kernel(body[which], 32)).any()


@needs_gxx
@pytest.mark.parametrize(
    ("body", "threads", "wrong"),
    [
        ("if (threadIdx != 7) { simdgroup_load(m, x, 8, 0, false); }", 32, "31 of 32 threads wait"),
        ("simdgroup_load(m, x, 8, 0, false);", 40, "8 of 40 threads wait for lanes"),
        ("simdgroup_load(m, x + threadIdx / 16, 8, 0, false);", 32, "lanes disagree"),
        ("simdgroup_store(m, x, 8, 0, threadIdx < 3);", 32, "lanes disagree"),
    ],
)
def test_lanes_that_do_not_work_together(body: str, threads: int, wrong: str) -> None:
    with pytest.raises(Exception, match=wrong):
        run_kernel(f"threadgroup float x[65]; simdgroup_float8x8 m;\n  {body}", threads)


@needs_gxx
def test_barrier_that_some_threads_miss() -> None:
    body = "if (threadIdx < 3) { threadgroup_barrier(mem_flags::mem_threadgroup); }"
    with pytest.raises(Exception, match=r"3 of 40 threads wait at a barrier"):
        run_kernel(body, 40)
