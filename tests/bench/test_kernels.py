"""Benchmark each kernel of the profile `fast` at the shapes of gpt-oss-20b, with fewer experts. It
leaves out take_rows, which copies rows.

This is not part of the ordinary tests: run `pytest tests/bench`, one kernel with `-k moe`.
`extra_info` holds the rate: GMAC/s for matrix products and for attention in prefill; GB/s for all
others, with all inputs and outputs counted once. Data that a run has in memory, not in a cache,
comes from memory here too. The form `few_n` is the next tokens of n sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import tvm
from kernel_cases import DECODE, FEW_FORMS, HERE, Form, row_facts, tiles_of
from kernel_runner import Array, BuiltKernel, build, value_of
from pytest_benchmark.fixture import BenchmarkFixture
from tvm.tirx import PrimFunc

from osscompile.importer.graph import TOKENS
from osscompile.importer.synthetic import gpt_oss_config
from osscompile.importer.weights import pack_rows
from osscompile.kernels import attention, experts, kv_cache, matmul, rows
from osscompile.kernels.quantize import quantize as quantize_kernel
from osscompile.runtime.kv_cache import PAGE_TOKENS

CONFIG = gpt_oss_config(num_layers=1, num_experts=4)
HIDDEN, INNER, TOP_K = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_experts_per_token
HEADS = (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim)
PREFILL = Form("prefill", TOKENS, 128)
CONTEXT = 2048  # tokens in the cache of each sequence, including the new ones
TABLE_PAGES = CONTEXT // PAGE_TOKENS + 1  # one may be read in vain
LM_HEAD_ROWS = 32768  # of 201,088
SWEPT_BYTES = 128 << 20  # copies of the arguments take turns, so that no cache holds them


@dataclass(frozen=True)
class Case:
    """A kernel, the `macs` of one call, and the int32 arguments that are addresses, by name. All
    other arguments are random or, if int32, 0."""

    kernel: PrimFunc
    macs: int = 0
    addresses: dict[str, Array] = field(default_factory=dict)


def new_tokens(form: Form) -> dict[str, Array]:
    """Return the rows of a step and the tables: the last tokens of one sequence for a symbolic
    number of them, else the last token of each of so many sequences."""
    at = np.arange(form.count)
    one = form is PREFILL
    positions, starts = (CONTEXT - form.count + at, 0) if one else (CONTEXT - 1, at * TABLE_PAGES)
    num_pages = TABLE_PAGES * (1 if one else form.count)
    return {
        "rows": row_facts(positions, starts, ids=at),
        "tables": np.arange(num_pages, dtype=np.int32),
    }


def embed(form: Form) -> Case:
    facts = {"rows": new_tokens(form)["rows"]}
    return Case(rows.embed_q8(form.tokens, form.count, HIDDEN), addresses=facts)


def rms_norm(form: Form) -> Case:
    return Case(rows.rms_norm_quantized("q8", form.tokens, HIDDEN, 1e-5))


def quantize(form: Form) -> Case:
    return Case(quantize_kernel("q8", form.tokens, HIDDEN))


def dense(form: Form, inputs: int, num_rows: int, bias: bool, residual: bool) -> Case:
    kernel = matmul.dense_q8(form.tokens, inputs, num_rows, bias, residual)
    return Case(kernel, macs=form.count * inputs * num_rows)


def qkv(form: Form) -> Case:
    return dense(form, HIDDEN, CONFIG.qkv_size, bias=True, residual=False)


def attention_out(form: Form) -> Case:
    return dense(form, CONFIG.q_size, HIDDEN, bias=True, residual=True)


def lm_head(form: Form) -> Case:
    return dense(form, HIDDEN, LM_HEAD_ROWS, bias=False, residual=False)


def rotate_queries(form: Form) -> Case:
    facts = {"rows": new_tokens(form)["rows"]}
    return Case(rows.rotate_queries(form.tokens, *HEADS, CONTEXT), addresses=facts)


def append_kv(form: Form) -> Case:
    kernel = kv_cache.append_kv(form.tokens, *HEADS, CONTEXT, "float16")
    return Case(kernel, addresses=new_tokens(form))


def attend(form: Form, window: int | None) -> Case:
    kernel = attention.attention(form.tokens, *HEADS, window, "float16")
    facts = new_tokens(form)
    seen = sum(min(int(at) + 1, window or CONTEXT) for _, at, _ in facts["rows"])
    if form is PREFILL:
        facts["tiles"] = tiles_of(form.count)
    return Case(kernel, 2 * CONFIG.q_size * seen, facts)


def attention_full(form: Form) -> Case:
    return attend(form, None)


def attention_sliding(form: Form) -> Case:
    return attend(form, CONFIG.window)


def router(form: Form) -> Case:
    kernel = matmul.route_bf16(form.tokens, HIDDEN, 32, TOP_K)
    return Case(kernel, macs=form.count * HIDDEN * 32)


def sort_by_expert(form: Form) -> Case:
    ids = np.random.default_rng(0).integers(32, size=(form.count, TOP_K), dtype=np.int32)
    return Case(experts.sort_by_expert(form.tokens, 32, TOP_K), addresses={"ids": ids})


def gather_rows(form: Form) -> Case:
    count = form.count * TOP_K
    token = np.resize(np.arange(form.count, dtype=np.int32), count)
    kernel = rows.gather_rows("q8", form.tokens, HIDDEN, form.expert_rows(count))
    return Case(kernel, addresses={"row_token": token})


def moe_up(form: Form) -> Case:
    row_expert = row_experts(form)
    sizes = (CONFIG.num_experts, HIDDEN, INNER, CONFIG.swiglu_limit)
    kernel = matmul.moe_mxfp4_swiglu("q8", form.expert_rows(len(row_expert)), *sizes)
    return Case(kernel, len(row_expert) * HIDDEN * INNER * 2, {"row_expert": row_expert})


def moe_down(form: Form) -> Case:
    row_expert = row_experts(form)
    slots = np.arange(len(row_expert), dtype=np.int32).reshape(form.count, TOP_K)
    sizes = (CONFIG.num_experts, INNER, HIDDEN, TOP_K)
    kernel = matmul.moe_mxfp4_sum("q8", form.tokens, form.expert_rows(len(row_expert)), *sizes)
    addresses = {"row_expert": row_expert, "slots": slots}
    return Case(kernel, len(row_expert) * HIDDEN * INNER, addresses)


def row_experts(form: Form) -> Array:
    """Give every expert as many rows, side by side as `sort_by_expert` leaves them."""
    count = form.count * TOP_K
    return np.sort(np.arange(count, dtype=np.int32) % CONFIG.num_experts).astype(np.int32)


CASES = [
    embed,
    rms_norm,
    quantize,
    qkv,
    rotate_queries,
    append_kv,
    attention_full,
    attention_sliding,
    attention_out,
    router,
    sort_by_expert,
    gather_rows,
    moe_up,
    moe_down,
    lm_head,
]


@pytest.mark.parametrize("form", [DECODE, *FEW_FORMS, PREFILL], ids=repr)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_speed(make: Callable[[Form], Case], form: Form, benchmark: BenchmarkFixture) -> None:
    case = make(form)
    kernel = build(case.kernel, HERE)
    arguments = bound(kernel, case, form)
    num_bytes = sum(a.nbytes for a in arguments)
    copies = 1 if benchmark.disabled else min(16, -(-SWEPT_BYTES // num_bytes))
    turns = itertools.cycle([[tvm.runtime.tensor(a) for a in arguments] for _ in range(copies)])
    benchmark(lambda: kernel.main(*next(turns)))
    if not benchmark.disabled:
        compute = case.macs and form is PREFILL
        rate = (case.macs if compute else num_bytes) / benchmark.stats["median"] / 1e9
        benchmark.extra_info["GMAC/s" if compute else "GB/s"] = round(rate, 2)


def bound(kernel: BuiltKernel, case: Case, form: Form) -> list[Array]:
    """Return all arguments in the target's layout."""
    num_pages = len(new_tokens(form)["tables"])
    symbols = {"tokens": form.count, "expert_rows": form.count * TOP_K}
    symbols |= {f"few_{name}": count for name, count in symbols.items()}
    symbols |= {"pages": num_pages, "table_pages": num_pages}
    symbols |= {"tiles": len(tiles_of(form.count))}
    assert case.addresses.keys() <= {parameter.name for parameter in case.kernel.params}
    arrays = []
    for i, parameter in enumerate(case.kernel.params):
        shape = tuple(value_of(extent, symbols) for extent in parameter.shape)
        array = case.addresses.get(parameter.name)
        if array is None:
            array = random_array(shape, str(parameter.dtype))
        assert array.shape == shape, (parameter.name, array.shape, shape)
        if i in kernel.packed:
            array = pack_rows(array, kernel.packed[i], kernel.lanes)
        arrays.append(np.ascontiguousarray(array))
    return arrays


def random_array(shape: tuple[int, ...], dtype: str) -> Array:
    """Return numbers near 1, and MXFP4 scales near 2**0: no number that a CPU treats specially."""
    rng = np.random.default_rng(0)
    if dtype == "int32":
        return np.zeros(shape, np.int32)
    if dtype in ("float32", "float16"):
        return rng.uniform(0.5, 1.0, shape).astype(dtype)
    if dtype == "uint16":  # bfloat16
        bits = rng.uniform(0.5, 1.0, shape).astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16)
    if dtype == "uint8":
        return rng.integers(125, 130, shape, dtype=np.uint8)
    kind = np.iinfo(dtype)
    return rng.integers(kind.min, kind.max, shape, dtype=dtype)
