"""Matrix products of a few rows of activations in int8: a block of weights is unpacked into
registers once, for all rows that share them.

Memory limits these, so a task goes through its weights in the order in which they lie; see
`byte_product.py` for the products and their offset.
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Stmt

from ...targets import Target
from ..formats import is_few
from ..product import OPS, Product
from ..records import Choose
from ..tail import split_tail
from .byte_product import ByteProduct
from .instructions import FOR_FEW
from .prefetch import LINE_BYTES
from .tail import with_tail
from .vectors import LANES, prefetch

# Row groups (of vector_lanes rows) that one parallel task computes, at most: fewer leave the cores
# waiting for each other, more leave some cores without work at the end.
ROW_GROUPS_PER_TASK = (2, 4, 6, 8, 12, 16, 24, 32)
ROWS_TOGETHER = (1, 2, 4, 8)  # that share a block of weights in registers
PREFETCH_BYTES = (512, 1024, 2048, 4096, 8192)  # how far ahead weights are fetched


def few(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` with a few rows of activations in int8, or in digits, where the target
    has a byte product; declines others, and weights that do not fill vectors."""
    if str(function.attrs["op"]) not in OPS or target.int8_dot not in FOR_FEW:
        return None
    product = Product(function)
    if not is_few(product.num_rows) or "xq" not in product.tensors:
        return None
    if product.columns % target.vector_lanes:
        return None
    scheduled = function.with_body(_body(product, target, choose))
    return with_tail(scheduled, split_tail(function)[1], product.columns, target, choose)


def _body(product: Product, target: Target, choose: Choose) -> Stmt:
    assert target.int8_dot is not None
    instructions = FOR_FEW[target.int8_dot]
    xq, words, out = (product.tensors[n] for n in ("xq", "words", "out"))
    shared = ByteProduct(product, instructions)
    unpack, scale_of, begin, scaled = shared.unpacked, shared.scale_of, shared.begin, shared.scaled
    groups, halves, num_rows = product.columns // LANES, product.halves, product.num_rows
    blocks, digits = product.blocks, product.digits
    together = 1  # of one token every row has another expert
    if not isinstance(num_rows, tirx.IntImm):
        together = choose("rows_together", ROWS_TOGETHER, 4 if product.expert is None else 2)
    num_bytes = LANES * shared.inputs
    limit = choose("row_groups_per_task", ROW_GROUPS_PER_TASK, 8)
    per_task = max(d for d in range(1, limit + 1) if groups % d == 0)
    by_turns = halves > 1 and choose("halves_by_turns", (0, 1), 0 if digits > 1 else 1)
    inner = halves if by_turns else 1
    distance = choose("prefetch_bytes", PREFETCH_BYTES, 2048)
    parts, vectors, lines = shared.parts, shared.vectors, shared.lines
    batches = parts if digits == 1 else 1  # what is unpacked for one use is in registers no longer

    def weight_at(first: Expr, half: Expr, group: Expr, block: Expr) -> tuple[Expr, ...]:
        return product.weight_at(product.expert_of(first), half, group, block)

    def row_of(first: Expr, t: Expr) -> Expr:
        return shared.row_of(first, t) if together > 1 else first

    def dot(total: Expr, unpacked: tirx.Buffer, row: Expr, *at: Expr) -> Expr:
        block, digit, part = at
        at_row = shared.at_digit(row, block, digit)

        def weight(vector: Expr) -> Expr:
            return unpacked.vload([vector, 0], f"uint8x{num_bytes}")

        def x(vector: Expr) -> Expr:
            return instructions.four_activations(xq, at_row, vector)

        return shared.dot_part(total, weight, x, part)

    next_run = product.next_run(together)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for task in T.parallel(T.int64(groups // per_task)):
            unpacked = T.alloc_buffer((vectors, num_bytes), "uint8")
            scale = T.alloc_buffer((LANES,), "float32")
            acc = T.alloc_buffer((halves, together, LANES), "float32")
            total = T.alloc_buffer((together, LANES), "int32")
            first = T.alloc_buffer((1,), "int64")
            end = T.alloc_buffer((1,), "int64")
            end[0] = T.int64(0)
            while end[0] < num_rows:
                next_run(first, end)
                for group in range(T.int64(per_task)):
                    for half in T.unroll(halves):
                        for t in T.unroll(together):
                            acc[half, t, 0:LANES] = T.broadcast(T.float32(0), LANES)
                    for outer in T.unroll(halves // inner):
                        for block in range(T.int64(blocks)):
                            for turn in T.unroll(inner):
                                for line in T.unroll(lines):
                                    T.evaluate(
                                        prefetch(
                                            words,
                                            weight_at(
                                                first[0],
                                                outer * inner + turn,
                                                task * per_task + group,
                                                block,
                                            ),
                                            line + distance // LINE_BYTES,
                                        )
                                    )
                                for lane in T.vectorized(LANES):
                                    scale[lane] = scale_of(
                                        weight_at(
                                            first[0],
                                            outer * inner + turn,
                                            task * per_task + group,
                                            block,
                                        ),
                                        lane,
                                    )
                                for t in T.unroll(together):
                                    total[t, 0:LANES] = T.broadcast(T.int32(0), LANES)
                                for digit in T.unroll(digits):
                                    for t in T.unroll(together):
                                        total[t, 0:LANES] = begin(
                                            total.vload([t, 0], f"int32x{LANES}"),
                                            digit,
                                            row_of(first[0], t),
                                            block,
                                            LANES,
                                        )
                                    for batch in T.unroll(batches):
                                        if digit == 0:
                                            for v in T.unroll(vectors // batches):
                                                unpacked[
                                                    batch * (vectors // batches) + v, 0:num_bytes
                                                ] = unpack(
                                                    weight_at(
                                                        first[0],
                                                        outer * inner + turn,
                                                        task * per_task + group,
                                                        block,
                                                    ),
                                                    batch * (vectors // batches) + v,
                                                )
                                        for part in T.unroll(parts // batches):
                                            for t in T.unroll(together):
                                                total[t, 0:LANES] = dot(
                                                    total.vload([t, 0], f"int32x{LANES}"),
                                                    unpacked,
                                                    row_of(first[0], t),
                                                    block,
                                                    digit,
                                                    batch * (parts // batches) + part,
                                                )
                                for t in T.unroll(together):
                                    acc[outer * inner + turn, t, 0:LANES] = acc.vload(
                                        [outer * inner + turn, t, 0], f"float32x{LANES}"
                                    ) + scaled(
                                        total.vload([t, 0], f"int32x{LANES}"),
                                        scale.vload([0], f"float32x{LANES}"),
                                        row_of(first[0], t),
                                        block,
                                        LANES,
                                    )
                    for t in T.unroll(together):
                        if first[0] + t < end[0]:
                            for lane in T.vectorized(LANES):
                                out[first[0] + t, (task * per_task + group) * LANES + lane] = (
                                    product.output(
                                        first[0] + t,
                                        (task * per_task + group) * LANES + lane,
                                        lambda half: acc[half, t, lane],
                                    )
                                )

    return body.body
