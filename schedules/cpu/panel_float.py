"""Panels of float32, scaled: for activations of float32 or in digits, and for targets without a
byte product."""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Stmt

from ...targets import Target
from ..formats import (
    BLOCK,
    FP4_OFFSET,
    FP4_PER_WORD,
    INT8_PER_WORD,
    bf16_to_float32,
    const,
    fp4_offset_by_12,
    half_e8m0_to_float32,
    int8_of_word,
    sum_of_digits,
)
from ..records import Choose
from .product import Product, whole_parts

GROUPS_PER_PANEL = (1, 2, 4, 8)  # as many sums in registers: they hide each other's latency
BLOCKS_PER_PANEL = (1, 2, 3, 4)
ROWS_PER_PANEL = 64  # that an unpacked panel serves, at most


def float_panels(product: Product, target: Target, choose: Choose) -> Stmt:
    """The body of a kernel on activations of any kind."""
    lanes = target.vector_lanes
    tensors, out, num_rows = product.tensors, product.out, product.num_rows
    groups, halves = product.columns // lanes, product.halves
    # few columns, as of a router: several tasks matter more
    wanted = max(1, min(8 // halves, groups // 4))
    num_groups = choose("groups_per_panel", *whole_parts(groups, GROUPS_PER_PANEL, wanted))
    num_blocks = choose("blocks_per_panel", *whole_parts(product.blocks, BLOCKS_PER_PANEL, 2))
    together = num_groups * halves

    def weight(expert: Expr, task: Expr, r: Expr, block: Expr, k: Expr, lane: Expr) -> Expr:
        group = task * num_groups + r % num_groups
        if "weight" in tensors:
            return bf16_to_float32(tensors["weight"][group, block * BLOCK + k, lane])
        at = product.weight_at(expert, r // num_groups, group, block)
        words, scale = tensors["words"], tensors["scales"][(*at, lane)]
        if product.expert is None:
            word = words[(*at, k // INT8_PER_WORD, lane)]
            return int8_of_word(word, k % INT8_PER_WORD).astype("float32") * scale.astype("float32")
        value = fp4_offset_by_12(words[(*at, k // FP4_PER_WORD, lane)], k % FP4_PER_WORD)
        doubled = value - const(FP4_OFFSET, "int32")
        return doubled.astype("float32") * half_e8m0_to_float32(scale)

    def activation(row: Expr, block: Expr, k: Expr) -> Expr:
        if "x" in tensors:
            return tensors["x"][row, block * BLOCK + k]
        xq, xs = tensors["xq"], tensors["xs"]
        if len(xq.shape) == 4:
            whole = sum_of_digits(lambda digit: xq[row, block, digit, k])
            return whole.astype("float32") * xs[row, block]
        return xq[row, block, k].astype("float32") * xs[row, block]

    next_run = product.next_run(ROWS_PER_PANEL)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for task in T.parallel(T.int64(groups // num_groups)):
            panel = T.alloc_buffer((num_blocks, BLOCK, together, lanes), "float32")
            x = T.alloc_buffer((ROWS_PER_PANEL, num_blocks, BLOCK), "float32")
            acc = T.alloc_buffer((ROWS_PER_PANEL, together, lanes), "float32")
            sums = T.alloc_buffer((together, lanes), "float32")
            first = T.alloc_buffer((1,), "int64")
            end = T.alloc_buffer((1,), "int64")
            end[0] = T.int64(0)
            while end[0] < num_rows:
                next_run(first, end)
                for t in range(end[0] - first[0]):
                    for r in T.unroll(together):
                        for lane in T.vectorized(lanes):
                            acc[t, r, lane] = T.float32(0)
                for chunk in range(T.int64(product.blocks // num_blocks)):
                    for b, r in T.grid(num_blocks, together):
                        for k in T.unroll(BLOCK):
                            for lane in T.vectorized(lanes):
                                panel[b, k, r, lane] = weight(
                                    product.expert_of(first[0]),
                                    task,
                                    r,
                                    chunk * num_blocks + b,
                                    k,
                                    lane,
                                )
                    for t, b in T.grid(end[0] - first[0], num_blocks):
                        for k in T.vectorized(BLOCK):
                            x[t, b, k] = activation(first[0] + t, chunk * num_blocks + b, k)
                    for t in range(end[0] - first[0]):
                        for r in T.unroll(together):
                            for lane in T.vectorized(lanes):
                                sums[r, lane] = acc[t, r, lane]
                        for b, k in T.grid(num_blocks, BLOCK):
                            for r in T.unroll(together):
                                for lane in T.vectorized(lanes):
                                    sums[r, lane] += x[t, b, k] * panel[b, k, r, lane]
                        for r in T.unroll(together):
                            for lane in T.vectorized(lanes):
                                acc[t, r, lane] = sums[r, lane]
                for t in range(end[0] - first[0]):
                    for r in T.unroll(num_groups):
                        for lane in T.vectorized(lanes):
                            out[first[0] + t, (task * num_groups + r) * lanes + lane] = (
                                product.output(
                                    first[0] + t,
                                    (task * num_groups + r) * lanes + lane,
                                    lambda half: acc[t, half * num_groups + r, lane],
                                )
                            )

    return body.body
