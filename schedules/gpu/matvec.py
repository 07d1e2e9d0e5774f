"""Schedule the matrix products of a few rows of activations, which the memory's speed limits.

A subgroup computes one column: its threads take the blocks of 32 inputs by turns, 16 bytes of
weights a load, and add up what they found. The subgroups of a work-group compute neighbouring
columns of one row, and so read the same activations.
"""

from collections.abc import Iterable
from functools import reduce

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import IntImm, PrimFunc, Stmt

from ...targets import Target
from ..formats import (
    BLOCK,
    FP4_PER_WORD,
    INT8_PER_WORD,
    bf16_to_float32,
    const,
    fp4_bytes_offset_by_12,
    fp4_offset_by_12,
    half_e8m0_to_float32,
    int8_of_word,
    sum_of_digits,
)
from ..product import OPS, Product, whole_parts
from ..records import Choose
from .dot4 import dot
from .tail import with_tail

COLUMNS_TOGETHER = (1, 2, 4, 8, 16)  # subgroups of a work-group
WORDS = 4  # of 32 bits: a load; vectors have 4 elements at most everywhere


def matvec(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` of a known number of rows of activations; declines others."""
    if str(function.attrs["op"]) not in OPS:
        return None
    product = Product(function)
    if not isinstance(product.num_rows, IntImm):
        return None
    return with_tail(function, _body(product, target, choose), target, choose)


def _body(product: Product, target: Target, choose: Choose) -> Stmt:
    tensors, out, halves = product.tensors, product.out, product.halves
    threads, columns = target.subgroup_size, product.columns
    fitting = [n for n in COLUMNS_TOGETHER if n * threads <= target.max_threads]
    together = choose("columns_together", *whole_parts(columns, fitting, 4))
    groups, num_rows = columns // together, int(product.num_rows)
    dense, fp4 = "weight" in tensors, product.expert is not None
    per_word = 2 if dense else FP4_PER_WORD if fp4 else INT8_PER_WORD
    words = 2 if dense else WORDS
    loads = 2 if dense else BLOCK // per_word // words  # of 8 bfloat16 inputs, or of a block
    inputs = loads * words * per_word
    parts = product.blocks * BLOCK // inputs  # that the threads of a subgroup take by turns

    def loaded(row: Expr, half: Expr, column: Expr, part: Expr, load: Expr) -> Expr:
        """`words` of weights as one vector."""
        if dense:
            at = part * inputs + load * words * per_word
            return T.reinterpret(
                tensors["weight"].vload([column, at], "uint16x4"), dtype="uint32x2"
            )
        at = product.weight_at(product.expert_of(row), half, column, part)
        return tensors["words"].vload([*at, load * words], f"uint32x{words}")

    def terms(word: Expr, row: Expr, part: Expr, k: Expr) -> Expr:
        """The products of the inputs of a word, the k-th of a part, int32 or float32."""
        if dense:
            return _sum(
                bf16_to_float32((word >> const(16 * j, "uint32")).astype("uint16"))
                * tensors["x"][row, part * inputs + k * per_word + j]
                for j in range(per_word)
            )
        if not by_fours:
            weight = fp4_offset_by_12 if fp4 else int8_of_word
            return _sum(
                weight(word, const(j, "int64"))
                * product.whole_activation(row, part, k * per_word + j)
                for j in range(per_word)
            )
        fours = [fp4_bytes_offset_by_12(word, const(j, "int64")) for j in (0, 1)] if fp4 else [word]

        def digit(place: int) -> Expr:
            return _sum(
                dot(four, product.four_activations(row, part, k * per_word + 4 * j, place))
                for j, four in enumerate(fours)
            )

        return sum_of_digits(digit) if product.digits > 1 else digit(0)

    def scaled(total: Expr, row: Expr, half: Expr, column: Expr, part: Expr) -> Expr:
        if dense:
            return total
        at = product.weight_at(product.expert_of(row), half, column, part)
        scale = tensors["scales"][at]
        if fp4:
            unbiased = total - tensors["xoffset"][row, part]
            scale = half_e8m0_to_float32(scale)
            return unbiased.astype("float32") * scale * tensors["xs"][row, part]
        return total.astype("float32") * scale.astype("float32") * tensors["xs"][row, part]

    by_fours = target.int8_dot is not None and not dense
    zero = const(0, "float32" if dense else "int32")

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for group in T.thread_binding(T.int64(num_rows * groups), thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(together), thread="threadIdx.y"):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    word = T.alloc_buffer((loads * words,), "uint32", scope="local")
                    total = T.alloc_buffer((1,), str(zero.ty), scope="local")
                    sums = T.alloc_buffer((halves,), "float32", scope="local")
                    gate = T.alloc_buffer((1,), "float32", scope="local")
                    up = T.alloc_buffer((1,), "float32", scope="local")
                    for half in T.unroll(halves):
                        sums[half] = T.float32(0)
                    for step in range(T.int64(-(-parts // threads))):
                        if step * threads + thread < parts:
                            for half in T.unroll(halves):
                                for load in T.unroll(loads):
                                    word[load * words : load * words + words] = loaded(
                                        group // groups,
                                        half,
                                        group % groups * together + member,
                                        step * threads + thread,
                                        load,
                                    )
                                total[0] = zero
                                for k in T.unroll(loads * words):
                                    total[0] += terms(
                                        word[k],
                                        group // groups,
                                        step * threads + thread,
                                        k,
                                    )
                                sums[half] += scaled(
                                    total[0],
                                    group // groups,
                                    half,
                                    group % groups * together + member,
                                    step * threads + thread,
                                )
                    if halves == 2:
                        add_both(sums[0], sums[1], gate, up, thread)
                    else:
                        add_up(sums[0], gate, thread)
                    if thread == 0:
                        out[group // groups, group % groups * together + member] = product.output(
                            group // groups,
                            group % groups * together + member,
                            lambda half: T.Select(half == 0, gate[0], up[0]),
                        )

    return body.body


def _sum(terms: Iterable[Expr]) -> Expr:
    return reduce(lambda x, y: x + y, terms)


@T.macro
def add_up(value, total, thread):  # type: ignore[no-untyped-def]
    """`total` is the sum of all threads' values."""
    with T.attr(
        T.comm_reducer(lambda x, y: x + y, [T.float32(0)]),
        "reduce_scope",
        T.reinterpret("handle", T.uint64(0)),
    ):
        T.tvm_thread_allreduce(T.uint32(1), value, True, total[0], thread, dtype="void")


@T.macro
def add_both(a, b, total_a, total_b, thread):  # type: ignore[no-untyped-def]
    with T.attr(
        T.comm_reducer(lambda x, y, z, w: (x + z, y + w), [T.float32(0), T.float32(0)]),
        "reduce_scope",
        T.reinterpret("handle", T.uint64(0)),
    ):
        T.tvm_thread_allreduce(
            T.uint32(2), a, b, True, total_a[0], total_b[0], thread, dtype="void"
        )
