"""Panels of bytes: each vector is the memory operand of a byte product with 4 activations, which
stay in a register for all groups of the panel.

Activations are made unsigned by adding 128. What that adds to a sum, 128 x the sum of the weights,
is a product with activations of 128.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, Stmt

from ...targets import Target
from ..formats import BLOCK, half_e8m0_to_float32
from ..records import Choose
from .avx2 import broadcast_four, mxfp4_vector, prefetch
from .instructions import INSTRUCTIONS
from .product import ROWS_TOGETHER, Product, whole_parts

GROUPS_PER_PANEL = (1, 2, 4, 8)
BLOCKS_PER_PANEL = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18)
VECTORS = BLOCK // 4  # a vector holds 4 inputs of every column


def int8_panels(product: Product, target: Target, choose: Choose) -> Stmt:
    """The body of a kernel on int8 activations."""
    assert target.int8_dot is not None
    lanes, instructions = target.vector_lanes, INSTRUCTIONS[target.int8_dot]
    xq, xs, words, scales, out = (
        product.tensors[n] for n in ("xq", "xs", "words", "scales", "out")
    )
    groups, halves, num_rows = product.columns // lanes, product.halves, product.num_rows
    num_groups = choose("groups_per_panel", *whole_parts(groups, GROUPS_PER_PANEL, 4 // halves))
    num_blocks = choose("blocks_per_panel", *whole_parts(product.blocks, BLOCKS_PER_PANEL, 9))
    together = num_groups * halves
    fp4 = product.expert is not None
    vector_of = mxfp4_vector if fp4 else instructions.q8_vector
    dot = instructions.mxfp4_dot if fp4 else instructions.q8_dot
    vectors = VECTORS if fp4 else instructions.Q8_VECTORS
    lines = (BLOCK // 2 if fp4 else BLOCK) * lanes // 64  # of the cache, that a block fills

    def weight_at(expert: Expr, task: Expr, r: Expr, block: Expr) -> tuple[Expr, ...]:
        group = task * num_groups + r % num_groups
        return product.weight_at(expert, r // num_groups, group, block)

    def unpacked(at: tuple[Expr, ...], vector: Expr) -> Expr:
        return vector_of(lambda word: words.vload([*at, word, 0], "uint32x8"), vector)

    def scale_of(at: tuple[Expr, ...], lane: Expr) -> Expr:
        scale = scales[(*at, lane)]
        return half_e8m0_to_float32(scale) if fp4 else scale.astype("float32")

    def product_of(x: list[Expr], panel: Buffer, b: Expr, r: Expr) -> Expr:
        return dot(x, [panel.vload([b, r, v, 0], "int8x32") for v in range(vectors)])

    def correction_of(panel: Buffer, b: Expr, r: Expr) -> Expr:
        return product_of([T.broadcast(T.uint8(128), 32)] * VECTORS, panel, b, r)

    def term(
        x: Buffer, x_scale: Expr, panel: Buffer, correction: Buffer, scale: Buffer, *at: Expr
    ) -> Expr:
        t, b, r = at
        fours = [
            broadcast_four(x.vload([t, b, 4 * v], "uint8x4"), "uint8x32") for v in range(VECTORS)
        ]
        total = product_of(fours, panel, b, r) - correction.vload([b, r, 0], "int32x8")
        scale_of_both = scale.vload([b, r, 0], "float32x8") * T.broadcast(x_scale, lanes)
        return total.astype("float32x8") * scale_of_both

    next_run = product.next_run

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for task in T.parallel(T.int64(groups // num_groups)):
            panel = T.alloc_buffer((num_blocks, together, vectors, 32), "int8")
            correction = T.alloc_buffer((num_blocks, together, lanes), "int32")
            scale = T.alloc_buffer((num_blocks, together, lanes), "float32")
            x = T.alloc_buffer((ROWS_TOGETHER, num_blocks, BLOCK), "uint8")
            acc = T.alloc_buffer((ROWS_TOGETHER, together, lanes), "float32")
            sums = T.alloc_buffer((together, lanes), "float32", scope="local")
            first = T.alloc_buffer((1,), "int64", scope="local")
            end = T.alloc_buffer((1,), "int64", scope="local")
            end[0] = T.int64(0)
            while end[0] < num_rows:
                next_run(first, end)
                for t in range(end[0] - first[0]):
                    for r in T.unroll(together):
                        acc[t, r, 0:lanes] = T.broadcast(T.float32(0), lanes)
                for chunk in range(T.int64(product.blocks // num_blocks)):
                    for b, r in T.grid(num_blocks, together):
                        for line in T.unroll(lines):
                            T.evaluate(
                                prefetch(
                                    words,
                                    weight_at(
                                        product.expert_of(first[0]),
                                        task,
                                        r,
                                        (chunk + 1) * num_blocks + b,
                                    ),
                                    line,
                                )
                            )
                        for v in T.unroll(vectors):
                            panel[b, r, v, 0:32] = unpacked(
                                weight_at(
                                    product.expert_of(first[0]), task, r, chunk * num_blocks + b
                                ),
                                v,
                            )
                        correction[b, r, 0:lanes] = correction_of(panel, b, r)
                        for lane in T.vectorized(lanes):
                            scale[b, r, lane] = scale_of(
                                weight_at(
                                    product.expert_of(first[0]), task, r, chunk * num_blocks + b
                                ),
                                lane,
                            )
                    for t, b in T.grid(end[0] - first[0], num_blocks):
                        x[t, b, 0:BLOCK] = T.bitwise_xor(
                            T.reinterpret(
                                xq.vload([first[0] + t, chunk * num_blocks + b, 0], "int8x32"),
                                dtype="uint8x32",
                            ),
                            T.broadcast(T.uint8(128), 32),
                        )
                    for t in range(end[0] - first[0]):
                        for r in T.unroll(together):
                            sums[r, 0:lanes] = acc.vload([t, r, 0], "float32x8")
                        for b in range(num_blocks):
                            for r in T.unroll(together):
                                sums[r, 0:lanes] = sums.vload([r, 0], "float32x8") + term(
                                    x,
                                    xs[first[0] + t, chunk * num_blocks + b],
                                    panel,
                                    correction,
                                    scale,
                                    t,
                                    b,
                                    r,
                                )
                        for r in T.unroll(together):
                            acc[t, r, 0:lanes] = sums.vload([r, 0], "float32x8")
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
