"""Schedule the router's product: a work-group computes 16 rows x 32 experts, and its subgroups
share out the inputs.

A thread loads four neighbouring inputs of two rows, and of a column in each matrix, at once. They
are its numbers for two products of the matrix unit: which input comes in which place does not
matter, as long as rows and columns agree.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..formats import BLOCK, const, is_few
from ..product import Product, whole_parts
from ..records import Choose
from .lanes import LANES
from .mma import product
from .tail import with_tail
from .tf32 import MMA, rest, upper

ROWS = 16  # of a matrix
COLUMNS = 8
MATRICES = (1, 2, 4)  # of columns in a work-group
INPUTS = 16  # in a step: of two products
MEMBERS = (1, 2, 4, 6, 9, 12, 15, 18)  # subgroups of a work-group
STEPS = (1, 2, 3, 4, 5, 6)  # whose inputs a thread loads before it multiplies


def route(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule the router of any number of rows; declines others, and experts that do not fill
    matrices."""
    if str(function.attrs["op"]) != "route_bf16" or target.matrix != "tf32":
        return None
    product = Product(function)
    if is_few(product.num_rows) or product.columns % COLUMNS:
        return None
    return with_tail(function, _body(product, choose), target, choose)


def _body(router: Product, choose: Choose) -> Stmt:
    x, weight, out, num_rows = (
        router.tensors["x"],
        router.tensors["weight"],
        router.out,
        router.num_rows,
    )
    matrices = choose("matrices", *whole_parts(router.columns // COLUMNS, MATRICES, 4))
    steps, columns = router.blocks * BLOCK // INPUTS, matrices * COLUMNS
    members = choose("members", *whole_parts(steps, MEMBERS, 12))
    at_once = choose("steps_together", *whole_parts(steps // members, STEPS, 5))
    threads = members * LANES
    multiply = _multiply(matrices)

    def row_of(tile: Expr, lane: Expr, side: int) -> Expr:
        return T.min(tile * ROWS + side * 8 + lane // 4, num_rows - 1)

    def inputs_of(tile: Expr, lane: Expr, side: int, step: Expr) -> Expr:
        return x.vload([row_of(tile, lane, side), step * INPUTS + lane % 4 * 4], "float32x4")

    def weights_of(group: Expr, matrix: Expr, lane: Expr, step: Expr) -> Expr:
        column = group * columns + matrix * COLUMNS + lane // 4
        four = weight.vload([column, step * INPUTS + lane % 4 * 4], "uint16x4")
        return T.reinterpret(four, dtype="uint32x2")

    @T.macro
    def load(inputs, words, tile, group, first, lane):  # type: ignore[no-untyped-def]
        for i in T.unroll(at_once):
            for side in T.unroll(2):
                inputs[i * 8 + side * 4 : i * 8 + side * 4 + 4] = inputs_of(
                    tile, lane, side, first + i
                )
            for m in T.unroll(matrices):
                words[(i * matrices + m) * 2 : (i * matrices + m) * 2 + 2] = weights_of(
                    group, m, lane, first + i
                )

    @T.macro
    def keep(sums, shares, member, lane):  # type: ignore[no-untyped-def]
        for m in T.unroll(matrices):
            for i in T.unroll(4):
                shares[
                    member,
                    (i // 2 * 8 + lane // 4) * columns + m * COLUMNS + lane % 4 * 2 + i % 2,
                ] = sums[m, i]

    @T.macro
    def write(shares, total, tile, group, i):  # type: ignore[no-untyped-def]
        if T.And(i < ROWS * columns, tile * ROWS + i // columns < num_rows):
            total[0] = T.float32(0)
            for member in T.unroll(members):
                total[0] += shares[member, i]
            out[tile * ROWS + i // columns, group * columns + i % columns] = router.output(
                tile * ROWS + i // columns, group * columns + i % columns, lambda half: total[0]
            )

    @T.macro
    def compute(tile, group, member, lane):  # type: ignore[no-untyped-def]
        inputs = T.alloc_buffer((at_once * 8,), "float32", scope="local")
        words = T.alloc_buffer((at_once * matrices * 2,), "uint32", scope="local")
        sums = T.alloc_buffer((matrices, 4), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        shares = T.alloc_buffer((members, ROWS * columns), "float32", scope="shared")
        for m, i in T.grid(matrices, 4):
            sums[m, i] = T.float32(0)
        for some in range(T.int64(steps // members // at_once)):
            load(
                inputs,
                words,
                tile,
                group,
                (some * members + member) * at_once,
                lane,
            )
            for i in T.unroll(at_once):
                multiply(sums, inputs, words, i)
        keep(sums, shares, member, lane)
        for i in range(T.int64(-(-ROWS * columns // threads))):
            write(shares, total, tile, group, i * threads + member * LANES + lane)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for tile in T.thread_binding((num_rows + (ROWS - 1)) // ROWS, thread="blockIdx.y"):
            for group in T.thread_binding(T.int64(router.columns // columns), thread="blockIdx.x"):
                for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                    for lane in T.thread_binding(T.int64(LANES), thread="threadIdx.x"):
                        compute(tile, group, member, lane)

    return body.body


def _multiply(matrices: int) -> Callable[..., object]:
    """Return statements that add the products of the i-th step that a thread has loaded."""

    def weight(words: Buffer, i: Expr, m: Expr, half: Expr, side: int) -> Expr:
        """Return a bfloat16 of a word as the bits of a float32."""
        word = words[(i * matrices + m) * 2 + half]
        sixteen = const(16, "uint32")
        return word << sixteen if side == 0 else word & const(0xFFFF0000, "uint32")

    @T.macro
    def multiply(sums, inputs, words, i):  # type: ignore[no-untyped-def]
        parts = T.alloc_buffer((2, 4), "uint32", scope="local")
        for half in T.unroll(2):
            for j in T.unroll(4):
                parts[0, j] = upper(inputs[i * 8 + j % 2 * 4 + half * 2 + j // 2])
                parts[1, j] = rest(inputs[i * 8 + j % 2 * 4 + half * 2 + j // 2])
            for m in T.unroll(matrices):
                for part in T.unroll(2):
                    T.evaluate(
                        product(
                            MMA,
                            lambda k: sums[m, k],
                            lambda k: parts[part, k],
                            lambda side: weight(words, i, m, half, side),
                        )
                    )

    return multiply  # type: ignore[no-any-return]
