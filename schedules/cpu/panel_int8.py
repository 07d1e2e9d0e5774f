"""Panels of bytes: each vector of weights is multiplied with 4 activations in every lane, for some
rows of activations by turns.

The panel holds weights plus an offset: see `byte_product.py`.

An instruction set says how many inputs of a column a vector of weights holds (`INPUTS`), and how
many rows of activations, side by side, one product takes (`ROWS`).
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, Stmt

from ...targets import Target
from ..product import Product, whole_parts
from ..records import Choose
from .byte_product import ByteProduct
from .instructions import INSTRUCTIONS
from .vectors import LANES, broadcast_four, prefetch

GROUPS_PER_PANEL = (1, 2, 4, 8, 16)
BLOCKS_PER_PANEL = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18)
ROWS_PER_PANEL = (32, 64, 128, 256)  # an unpacked panel serves at most so many
ROWS_BY_TURNS = (1, 2, 4)  # that share a vector of weights in a register


def int8_panels(product: Product, target: Target, choose: Choose) -> Stmt:
    """Return the body of a kernel for activations in int8, or in digits."""
    assert target.int8_dot is not None
    instructions = INSTRUCTIONS[target.int8_dot]
    xq, words, out = (product.tensors[n] for n in ("xq", "words", "out"))
    shared = ByteProduct(product, instructions)
    unpacked, scale_of, row_of = shared.unpacked, shared.scale_of, shared.row_of
    begin, scaled = shared.begin, shared.scaled
    groups, halves, num_rows = product.columns // LANES, product.halves, product.num_rows
    # groups of columns that lie side by side in a register
    width = max(1, target.register_bits // 256)
    width = width if groups % width == 0 else 1
    at_once, inputs = instructions.ROWS, shared.inputs
    lanes, vector_bytes = width * LANES, LANES * inputs
    num_bytes, dot_lanes = width * vector_bytes, lanes * at_once
    # sums in registers, a wide one in two, hide each other's latency
    num_sums = target.num_registers // 4 * min(target.register_bits, 256) // 256
    wanted = max(width, num_sums // halves // at_once)
    counts = [count * width for count in GROUPS_PER_PANEL]
    num_groups = choose("groups_per_panel", *whole_parts(groups, counts, wanted))
    num_blocks = choose("blocks_per_panel", *whole_parts(product.blocks, BLOCKS_PER_PANEL, 9))
    most = choose("rows_per_panel", ROWS_PER_PANEL, 128)
    together = num_groups * halves // width  # vectors of columns
    wanted = max(1, num_sums // together)
    rows = [count for count in ROWS_BY_TURNS if count % at_once == 0]
    turns = choose("rows_by_turns", *whole_parts(max(rows), rows, wanted))
    digits, parts, vectors, lines = product.digits, shared.parts, shared.vectors, shared.lines

    def weight_at(row: Expr, task: Expr, r: Expr, part: Expr, block: Expr) -> tuple[Expr, ...]:
        """Return where part `part` of vector `r` of a row's panel lies in words and scales."""
        group = r * width + part
        column_group = task * num_groups + group % num_groups
        return product.weight_at(product.expert_of(row), group // num_groups, column_group, block)

    def dot(total: Expr, panel: Buffer, first: Expr, t: Expr, block: Expr, *at: Expr) -> Expr:
        """Add the products of the `at_once` rows from t on."""
        b, r, digit, part = at
        blocks_of_x = [shared.at_digit(row_of(first, t + i), block, digit) for i in range(at_once)]

        def weight(vector: Expr) -> Expr:
            return panel.vload([b, r, vector, 0], f"uint8x{num_bytes}")

        def x(vector: Expr) -> Expr:
            parts = [xq.vload([*x, vector * inputs], f"int8x{inputs}") for x in blocks_of_x]
            if at_once > 1:
                return T.Shuffle(parts, list(range(at_once * inputs)))
            return broadcast_four(parts[0], f"int8x{num_bytes}")

        return shared.dot_part(total, weight, x, part)

    next_run = product.next_run(most)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for task in T.parallel(T.int64(groups // num_groups)):
            panel = T.alloc_buffer((num_blocks, together, vectors, num_bytes), "uint8")
            scale = T.alloc_buffer((num_blocks, together, lanes), "float32")
            acc = T.alloc_buffer((most + turns, together, lanes), "float32")
            sums = T.alloc_buffer((turns, together, lanes), "float32")
            total = T.alloc_buffer((together, turns * lanes), "int32")
            first = T.alloc_buffer((1,), "int64")
            end = T.alloc_buffer((1,), "int64")
            end[0] = T.int64(0)
            while end[0] < num_rows:
                next_run(first, end)
                for t in range(end[0] - first[0] + (turns - 1)):
                    for r in T.unroll(together):
                        acc[t, r, 0:lanes] = T.broadcast(T.float32(0), lanes)
                for chunk in range(T.int64(product.blocks // num_blocks)):
                    for b, r, part in T.grid(num_blocks, together, width):
                        for line in T.unroll(lines):
                            T.evaluate(
                                prefetch(
                                    words,
                                    weight_at(
                                        first[0],
                                        task,
                                        r,
                                        part,
                                        (chunk + 1) * num_blocks + b,
                                    ),
                                    line,
                                )
                            )
                        for v in T.unroll(vectors):
                            panel[b, r, v, part * vector_bytes : (part + 1) * vector_bytes] = (
                                unpacked(
                                    weight_at(
                                        first[0],
                                        task,
                                        r,
                                        part,
                                        chunk * num_blocks + b,
                                    ),
                                    v,
                                )
                            )
                        for lane in T.vectorized(LANES):
                            scale[b, r, part * LANES + lane] = scale_of(
                                weight_at(
                                    first[0],
                                    task,
                                    r,
                                    part,
                                    chunk * num_blocks + b,
                                ),
                                lane,
                            )
                    for turn in range((end[0] - first[0] + (turns - 1)) // turns):
                        for t in T.unroll(turns):
                            for r in T.unroll(together):
                                sums[t, r, 0:lanes] = acc.vload(
                                    [turn * turns + t, r, 0], f"float32x{lanes}"
                                )
                        for b in range(num_blocks):
                            for t in T.unroll(turns):
                                for r in T.unroll(together):
                                    total[r, t * lanes : t * lanes + lanes] = T.broadcast(
                                        T.int32(0), lanes
                                    )
                            for digit in T.unroll(digits):
                                for t in T.unroll(turns):
                                    for r in T.unroll(together):
                                        total[r, t * lanes : t * lanes + lanes] = begin(
                                            total.vload([r, t * lanes], f"int32x{lanes}"),
                                            digit,
                                            row_of(first[0], turn * turns + t),
                                            chunk * num_blocks + b,
                                            lanes,
                                        )
                                for part in T.unroll(parts):
                                    for t in T.unroll(turns // at_once):
                                        for r in T.unroll(together):
                                            total[r, t * dot_lanes : t * dot_lanes + dot_lanes] = (
                                                dot(
                                                    total.vload(
                                                        [r, t * dot_lanes], f"int32x{dot_lanes}"
                                                    ),
                                                    panel,
                                                    first[0],
                                                    turn * turns + t * at_once,
                                                    chunk * num_blocks + b,
                                                    b,
                                                    r,
                                                    digit,
                                                    part,
                                                )
                                            )
                            for t in T.unroll(turns):
                                for r in T.unroll(together):
                                    sums[t, r, 0:lanes] = sums.vload(
                                        [t, r, 0], f"float32x{lanes}"
                                    ) + scaled(
                                        total.vload([r, t * lanes], f"int32x{lanes}"),
                                        scale.vload([b, r, 0], f"float32x{lanes}"),
                                        row_of(first[0], turn * turns + t),
                                        chunk * num_blocks + b,
                                        lanes,
                                    )
                        for t in T.unroll(turns):
                            for r in T.unroll(together):
                                acc[turn * turns + t, r, 0:lanes] = sums.vload(
                                    [t, r, 0], f"float32x{lanes}"
                                )
                for t in range(end[0] - first[0]):
                    for r in T.unroll(num_groups // width):
                        for lane in T.vectorized(lanes):
                            out[first[0] + t, task * num_groups * LANES + r * lanes + lane] = (
                                product.output(
                                    first[0] + t,
                                    task * num_groups * LANES + r * lanes + lane,
                                    lambda half: acc[t, half * (num_groups // width) + r, lane],
                                )
                            )

    return body.body
