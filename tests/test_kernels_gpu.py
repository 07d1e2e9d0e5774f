"""Every kernel, scheduled for GPUs, against the float64 reference: on this machine's OpenCL device,
and on the stand-ins for Metal and CUDA, which run the source that Metal and CUDA would compile.

Cases and checks are those of the kernels for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
from cuda_device import H100
from kernel_cases import (
    CLOSE,
    DECODE,
    HERE,
    PREFILL,
    ROW_CASES,
    Case,
    Form,
    assert_close,
    check_quantize,
    dense_bf16,
    dense_q8,
    every_form,
    every_matmul,
    few_forms,
    moe_mxfp4_sum_digits,
    moe_mxfp4_swiglu_q8,
    numbers,
    of_any_width,
    rms_norm,
    rotate_queries,
    route_bf16,
    row_facts,
    split_qkv,
)
from metal_device import needs_gxx, on_this_machine
from opencl_device import OPENCL, needs_opencl
from test_kernels_attention import Layer, both_dtypes, check_append, check_together, every_window
from test_kernels_routing import CHOICES, check_broken_route, check_route, check_sort, choices
from test_kernels_rows import (
    check_digits,
    check_gather,
    check_no_number,
    check_norm_quantized,
)

from osscompile.importer.graph import TOKENS
from osscompile.schedules.gpu.tasks import tasks
from osscompile.schedules.gpu.threads import threads
from osscompile.targets import Target

GPUS = [
    pytest.param(OPENCL, id="opencl", marks=needs_opencl),
    pytest.param(on_this_machine(HERE), id="metal", marks=needs_gxx),
    pytest.param(H100, id="cuda", marks=needs_gxx),
]


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest) -> Target:
    target: Target = request.param
    return target


@few_forms
@every_matmul
def test_matmul_of_a_few_rows(gpu: Target, case: Callable[..., Case], form: Form) -> None:
    case(form).check(gpu)


@every_form
@every_matmul
def test_matmul(gpu: Target, case: Callable[..., Case], form: Form) -> None:
    case(form).check(gpu)


@pytest.mark.parametrize("case", [dense_q8, moe_mxfp4_swiglu_q8], ids=lambda case: case.__name__)
def test_matmul_of_2880(gpu: Target, case: Callable[..., Case]) -> None:
    case(PREFILL, 2880, 64).check(gpu)


MORE_ROWS = Form("prefill", TOKENS, 70)  # than any tile has, and not a multiple; see row_experts


@pytest.mark.parametrize("columns", [24, 48, 192])
@pytest.mark.parametrize(
    "case", [dense_bf16, dense_q8, moe_mxfp4_sum_digits], ids=lambda case: case.__name__
)
def test_matmul_of_several_tiles(gpu: Target, case: Callable[..., Case], columns: int) -> None:
    """Columns fill only the tiles of single threads, or those of matrices too."""
    case(MORE_ROWS, 64, columns).check(gpu)


def test_matmul_of_several_tiles_of_both_halves(gpu: Target) -> None:
    moe_mxfp4_swiglu_q8(MORE_ROWS, 64, 192).check(gpu)


@every_form
@pytest.mark.parametrize("case", [*ROW_CASES, rotate_queries], ids=lambda case: case.__name__)
def test_row_kernel(gpu: Target, case: Callable[[Form], Case], form: Form) -> None:
    case(form).check(gpu)


@every_form
@of_any_width
def test_matmul_of_20_columns_fills_no_tile(
    gpu: Target, case: Callable[..., Case], form: Form
) -> None:
    case(form, 64, 20).check(gpu)


@pytest.mark.parametrize("hidden", [32, 256, 257, 2880])
def test_rms_norm_of_rows_that_groups_of_threads_fill_or_not(gpu: Target, hidden: int) -> None:
    rms_norm(PREFILL, hidden).check(gpu)


@every_form
@pytest.mark.parametrize("kind", ["q8", "digits"])
def test_rms_norm_quantized(gpu: Target, form: Form, kind: str) -> None:
    check_norm_quantized(form, kind, gpu)


@pytest.mark.parametrize("hidden", [32, 1184, 2880])
def test_rms_norm_quantized_of_rows_that_a_group_takes_by_turns_or_not(
    gpu: Target, hidden: int
) -> None:
    """1184 is 37 blocks, which no number of subgroups shares evenly."""
    check_norm_quantized(PREFILL, "q8", gpu, hidden)


@every_form
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_quantize_q8_is_exact(gpu: Target, form: Form, scale: float) -> None:
    check_quantize(form, numbers(7, form.count, 96, scale=scale), gpu)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_quantize_digits(gpu: Target, scale: float) -> None:
    check_digits(numbers(9, 21, 96, scale=scale), gpu)


@pytest.mark.parametrize("kind", ["q8", "digits"])
def test_quantize_of_what_is_no_number_shows(gpu: Target, kind: str) -> None:
    check_no_number(kind, gpu)


@every_form
@pytest.mark.parametrize("kind", ["q8", "digits"])
def test_gather_rows(gpu: Target, form: Form, kind: str) -> None:
    check_gather(form, kind, gpu)


@every_form
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 4), (4, 4), (5, 1), (32, 4)])
def test_route(gpu: Target, form: Form, num_experts: int, top_k: int) -> None:
    check_route(form, numbers(18, form.count, num_experts, scale=2.0), top_k, gpu)


def test_route_ties_go_to_the_lower_id(gpu: Target) -> None:
    check_route(PREFILL, np.zeros((PREFILL.count, 8), np.float32), 4, gpu)


@every_form
def test_route_without_numbers_still_names_different_experts(gpu: Target, form: Form) -> None:
    check_broken_route(form, gpu)


@every_form
@pytest.mark.parametrize("kind", CHOICES)
def test_sort_by_expert(gpu: Target, form: Form, kind: str) -> None:
    check_sort(form, choices(kind, form, 8, 4), 8, gpu)


@pytest.mark.parametrize(("top_k", "count"), [(1, 1025), (2, 1024), (3, 5), (4, 1500)])
def test_sort_by_expert_of_tokens_that_threads_share_or_not(top_k: int, count: int) -> None:
    """A work-group has 1024 threads; they load two or four choices at once."""
    form = Form("prefill", TOKENS, count)
    check_sort(form, choices("one_expert_unused", form, 8, top_k), 8, H100)


@pytest.mark.parametrize(("inputs", "num_experts"), [(96, 128), (2880, 32), (64, 24)])
def test_route_whose_inputs_and_experts_many_share(inputs: int, num_experts: int) -> None:
    route_bf16(PREFILL, inputs, num_experts).check(H100)


@every_form
@both_dtypes
@pytest.mark.parametrize("position", [0, 31, 47])
def test_append_kv_around_the_borders_of_pages(
    gpu: Target, form: Form, dtype: str, position: int
) -> None:
    """Halves are rounded as numpy rounds them."""
    check_append(form, dtype, position, gpu)


@every_window
@both_dtypes
def test_append_and_attention_in_parts(gpu: Target, window: int | None, dtype: str) -> None:
    layer = Layer(window, dtype, target=gpu)
    layer.check_in_parts(18)


@every_window
def test_attention_of_sequences_together(gpu: Target, window: int | None) -> None:
    check_together(window, gpu)


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_attention_with_the_heads_of_gpt_oss(gpu: Target, form: Form) -> None:
    layer = Layer(128, "float16", heads=64, kv_heads=8, head_dim=64, target=gpu)
    qkv = layer.tokens(64, 131 if form is DECODE else 140)
    layer.append(qkv[:130], row_facts(np.arange(130)))
    rounds = form is PREFILL and gpu.bf16_matrix is not None  # test_kernels_attention_f16.py
    out = layer.run(qkv[130:], 130, form)
    assert_close(out, layer.expected(qkv)[130:], 2e-4 if rounds else CLOSE)


@every_window
@pytest.mark.parametrize("count", [1, 2, 32, 33, 127, 128, 129, 145])
def test_attention_of_a_prompt_and_of_its_last_token(
    gpu: Target, window: int | None, count: int
) -> None:
    """Lengths cover chunk borders, and parts of the context without a key."""
    layer = Layer(window, target=gpu)
    qkv = layer.tokens(count, count)
    expected = layer.expected(qkv)
    assert_close(layer.run(qkv, 0), expected)
    assert_close(layer.run(qkv[-1:], count - 1, DECODE), expected[-1:])


@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (12, 1)])
def test_attention_of_any_number_of_heads(
    gpu: Target, form: Form, heads: int, kv_heads: int
) -> None:
    layer = Layer(16, heads=heads, kv_heads=kv_heads, positions=48, target=gpu)
    qkv = layer.tokens(heads, 21)
    split = 20 if form is DECODE else 13
    layer.run(qkv[:split], 0)
    assert_close(layer.run(qkv[split:], split, form), layer.expected(qkv)[split:])


def test_attention_past_position_4096(gpu: Target) -> None:
    layer = Layer(None, "float16", heads=2, kv_heads=1, positions=4352, target=gpu)
    qkv = layer.tokens(13, 4200)
    q, k, v = split_qkv(qkv, *layer.sizes)
    for start in range(0, 4199, 323):
        layer.run(qkv[start : min(start + 323, 4199)], start)
    last = reference.attention(q[-1:], k, v, layer.sinks, None)
    assert_close(layer.run(qkv[4199:], 4199, DECODE), last)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("sink", [-100.0, 10.0])
def test_attention_sinks(gpu: Target, window: int | None, sink: float) -> None:
    layer = Layer(window, positions=48, target=gpu)
    layer.sinks[:] = sink
    qkv = layer.tokens(16, 24)
    expected = layer.expected(qkv)
    assert_close(layer.run(qkv, 0), expected)
    assert_close(layer.run(qkv[-1:], 23, DECODE), expected[-1:])


# --- The plain rules --------------------------------------------------------------------------

# They are the same for all devices, whose own code the tests above compile.
on_one_gpu = pytest.mark.parametrize(
    "gpu",
    [
        GPUS[0],
        *(pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.long]) for p in GPUS[1:]),
    ],
    indirect=True,
)


@on_one_gpu
@every_form
@every_matmul
def test_matmul_a_thread_an_element(gpu: Target, case: Callable[..., Case], form: Form) -> None:
    case(form).check(gpu, threads)


@on_one_gpu
@every_window
def test_attention_a_thread_a_task(gpu: Target, window: int | None) -> None:
    layer = Layer(window, target=gpu, rule=tasks)
    layer.check_in_parts(18)
