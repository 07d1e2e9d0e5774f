"""Panels of scaled float32, for activations in float32 or in digits, and for targets without a byte
product."""

from tvm.script import tirx as T
from tvm.tirx import Stmt

from ...targets import Target
from ..formats import BLOCK
from ..product import Product, whole_parts
from ..records import Choose

GROUPS_PER_PANEL = (1, 2, 4, 8)  # and sums in registers, which hide each other's latency
BLOCKS_PER_PANEL = (1, 2, 3, 4)
ROWS_PER_PANEL = 64  # an unpacked panel serves at most so many


def float_panels(product: Product, target: Target, choose: Choose) -> Stmt:
    """Return the body of a kernel for activations of any kind."""
    lanes = target.vector_lanes
    out, num_rows = product.out, product.num_rows
    groups, halves = product.columns // lanes, product.halves
    # with few columns, as in the router, several tasks matter more
    wanted = max(1, min(8 // halves, groups // 4))
    num_groups = choose("groups_per_panel", *whole_parts(groups, GROUPS_PER_PANEL, wanted))
    num_blocks = choose("blocks_per_panel", *whole_parts(product.blocks, BLOCKS_PER_PANEL, 2))
    together = num_groups * halves

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
                                panel[b, k, r, lane] = product.weight(
                                    product.expert_of(first[0]),
                                    r // num_groups,
                                    task * num_groups + r % num_groups,
                                    chunk * num_blocks + b,
                                    k,
                                    lane,
                                )
                    for t, b in T.grid(end[0] - first[0], num_blocks):
                        for k in T.vectorized(BLOCK):
                            x[t, b, k] = product.activation(first[0] + t, chunk * num_blocks + b, k)
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
