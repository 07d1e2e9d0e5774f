"""Schedule the matrix products of a few rows of activations, whose speed memory limits.

A subgroup computes one column: its threads take the blocks of 32 inputs by turns, load 16 bytes of
weights at once, and add up their sums. The weights of some turns are loaded before the first is
used, so that the loads hide each other's latency. The subgroups of a work-group read the same
activations: they compute neighbouring columns of one row.
"""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..formats import (
    BLOCK,
    FP4_PER_WORD,
    INT8_PER_WORD,
    bf16_to_float32,
    const,
    half_e8m0_to_float32,
    is_few,
    sum_of_digits,
)
from ..product import OPS, Product, whole_parts
from ..records import Choose
from .launch_before import wait_call
from .packed_bytes import dot, fp4_bytes
from .tail import with_tail
from .texture import load_texel

COLUMNS_TOGETHER = (1, 2, 4, 8, 16)  # one for each subgroup of a work-group
TURNS_TOGETHER = (1, 2, 3, 4)
WORDS_WANTED = 24  # words of weights in a thread's registers
WORDS_WANTED_EARLY = 32  # where they are loaded while the launch before still runs
BF16_PER_WORD = 2
VECTOR = 4  # elements: the most that a vector has everywhere


def matvec(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` with a few rows of activations; declines others."""
    if str(function.attrs["op"]) not in OPS:
        return None
    product = Product(function)
    if not is_few(product.num_rows):
        return None
    return with_tail(function, _body(product, target, choose), target, choose)


def _body(product: Product, target: Target, choose: Choose) -> Stmt:
    tensors, out, halves = product.tensors, product.out, product.halves
    threads, columns = target.subgroup_size, product.columns
    dense, fp4 = "weight" in tensors, product.expert is not None
    x, x_dtype = (tensors["x"], "float32") if dense else (tensors["xq"], "uint32")
    per_word = BF16_PER_WORD if dense else FP4_PER_WORD if fp4 else INT8_PER_WORD
    words = 2 if dense else VECTOR  # in a load
    loads = 2 if dense else BLOCK // per_word // words  # for 8 bfloat16 inputs, or for a block
    inputs = loads * words * per_word
    parts = product.blocks * BLOCK // inputs  # which the threads of a subgroup take by turns
    x_elements = inputs if dense else product.digits * BLOCK // INT8_PER_WORD  # in a part
    turns = -(-parts // threads)
    fitting = [n for n in COLUMNS_TOGETHER if n * threads <= target.max_threads]
    together = choose("columns_together", *whole_parts(columns, fitting, 4))
    most_words = WORDS_WANTED_EARLY if target.has_dependent_launch else WORDS_WANTED
    wanted = most_words // (halves * loads * words)
    at_once = choose("turns_together", *whole_parts(turns, TURNS_TOGETHER, wanted))
    groups, num_rows = columns // together, product.num_rows

    def part_of(turn: Expr, thread: Expr) -> Expr:
        """Return a thread's part; turns past the last part repeat it, and it is not added."""
        return T.min(turn * threads + thread, const(parts - 1, "int64"))

    def added(turn: Expr, thread: Expr, value: Expr) -> Expr:
        exists = turn * threads + thread < parts
        return T.Select(exists, value, const(0, "float32"))  # no branch: loads stay before it

    def weights(expert: Expr, half: Expr, column: Expr, part: Expr, load: Expr) -> Expr:
        """Return the words of a load as one vector."""
        if dense:
            at = part * inputs + load * words * per_word
            four = tensors["weight"].vload([column, at], "uint16x4")
            return T.reinterpret(four, dtype="uint32x2")
        at = product.weight_at(expert, half, column, part)
        return tensors["words"].vload([*at, load * words], f"uint32x{words}")

    def activations(flat: Buffer, row: Expr, part: Expr, load: Expr) -> Expr:
        """Load `VECTOR` numbers of a part, or words of bytes."""
        at = (row * parts + part) * x_elements + load * VECTOR
        if target.has_textures:
            return load_texel(flat, at)
        return flat.vload([at], f"{x_dtype}x{VECTOR}")

    def terms(word: Expr, xs: Buffer, k: Expr, digit: int) -> Expr:
        """Return the sum of the products of the k-th word of a part."""
        if dense:
            low, high = (
                bf16_to_float32((word >> const(16 * j, "uint32")).astype("uint16"))
                for j in range(BF16_PER_WORD)
            )
            return low * xs[k * per_word] + high * xs[k * per_word + 1]
        first = digit * (BLOCK // INT8_PER_WORD) + k * (per_word // INT8_PER_WORD)
        if not fp4:
            return dot(word, xs[first], target)
        low, high = (fp4_bytes(word, const(j, "int64"), target) for j in range(2))
        return dot(low, xs[first], target) + dot(high, xs[first + 1], target)

    def scale_at(expert: Expr, half: Expr, column: Expr, part: Expr) -> Expr:
        return tensors["scales"][product.weight_at(expert, half, column, part)].astype(scale_dtype)

    def scaled(total: Buffer, scale: Expr, row: Expr, part: Expr) -> Expr:
        if dense:
            return total[0]
        whole = total[0] if product.digits == 1 else sum_of_digits(lambda digit: total[digit])
        if fp4:
            whole, scale = whole - tensors["xoffset"][row, part], half_e8m0_to_float32(scale)
        return whole.astype("float32") * scale.astype("float32") * tensors["xs"][row, part]

    zero = const(0, "float32" if dense else "int32")
    scale_dtype = "float32" if dense else _dtype_in_registers(tensors["scales"], target)
    # The launch before SwiGLU's may choose the experts; weights that are known are loaded early.
    weights_are_known = product.expert is None or halves == 1
    waits_first = target.has_dependent_launch and not weights_are_known
    waits_for_activations = target.has_dependent_launch and weights_are_known

    @T.macro
    def load_weights(word, scale, expert, column, some, thread):  # type: ignore[no-untyped-def]
        """Load those of a subgroup's next turns."""
        for turn in T.unroll(at_once):
            for half in T.unroll(halves):
                for load in T.unroll(loads):
                    word[
                        ((turn * halves + half) * loads + load) * words : (
                            (turn * halves + half) * loads + load + 1
                        )
                        * words
                    ] = weights(expert, half, column, part_of(some * at_once + turn, thread), load)
                if not dense:
                    scale[turn * halves + half] = scale_at(
                        expert, half, column, part_of(some * at_once + turn, thread)
                    )

    @T.macro
    def multiply(total, word, xs, first):  # type: ignore[no-untyped-def]
        """Multiply a part, whose words begin at `first`."""
        for digit in T.unroll(product.digits):
            total[digit] = zero
            for k in T.unroll(loads * words):
                total[digit] += terms(word[first + k], xs, k, digit)

    @T.macro
    def add_products(sums, total, word, scale, xs, flat, row, some, thread):  # type: ignore[no-untyped-def]
        for turn in T.unroll(at_once):
            for load in T.unroll(x_elements // VECTOR):
                xs[load * VECTOR : load * VECTOR + VECTOR] = activations(
                    flat, row, part_of(some * at_once + turn, thread), load
                )
            for half in T.unroll(halves):
                multiply(total, word, xs, (turn * halves + half) * loads * words)
                sums[half] += added(
                    some * at_once + turn,
                    thread,
                    scaled(
                        total,
                        scale[turn * halves + half],
                        row,
                        part_of(some * at_once + turn, thread),
                    ),
                )

    @T.macro
    def compute(flat, row, column, thread):  # type: ignore[no-untyped-def]
        expert = T.alloc_buffer((1,), "int64", scope="local")
        word = T.alloc_buffer((at_once * halves * loads * words,), "uint32", scope="local")
        scale = T.alloc_buffer((at_once * halves,), scale_dtype, scope="local")
        xs = T.alloc_buffer((x_elements,), x_dtype, scope="local")
        total = T.alloc_buffer((product.digits,), str(zero.ty), scope="local")
        sums = T.alloc_buffer((halves,), "float32", scope="local")
        gate = T.alloc_buffer((1,), "float32", scope="local")
        up = T.alloc_buffer((1,), "float32", scope="local")
        if waits_first:
            T.evaluate(wait_call())
        expert[0] = product.expert_of(row)
        for half in T.unroll(halves):
            sums[half] = T.float32(0)
        for some in range(T.int64(turns // at_once)):
            load_weights(word, scale, expert[0], column, some, thread)
            if waits_for_activations:
                if some == 0:
                    T.evaluate(wait_call())
            add_products(sums, total, word, scale, xs, flat, row, some, thread)
        if halves == 2:
            add_both(sums[0], sums[1], gate, up, thread)
        else:
            add_up(sums[0], gate, thread)
        if thread == 0:
            out[row, column] = product.output(
                row, column, lambda half: T.Select(half == 0, gate[0], up[0])
            )

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        flat = T.decl_buffer((num_rows * parts * x_elements,), x_dtype, data=x.data)
        for group in T.thread_binding(num_rows * groups, thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(together), thread="threadIdx.y"):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    compute(flat, group // groups, group % groups * together + member, thread)

    return body.body


def _dtype_in_registers(scales: Buffer, target: Target) -> str:
    """Return the type of a scale between its load and its use: the one in memory, because to
    convert it is to wait for it; but not every device has variables of halves."""
    dtype = str(scales.dtype)
    return "float32" if dtype == "float16" and not target.has_half else dtype


@T.macro
def add_up(value, total, thread):  # type: ignore[no-untyped-def]
    """Set `total` to the sum of all threads' values."""
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
