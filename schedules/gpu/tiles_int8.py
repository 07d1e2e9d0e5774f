"""Matrix products of many rows of quantised activations, on GPUs with a product of bytes: a
work-group computes a tile of rows x columns.

It goes through the inputs some blocks of 32 at a time: it puts weights, as bytes, and activations
into shared memory, and the threads add up each block's products as whole numbers, which they scale
and add in registers. If a tile has rows of several experts, it takes one expert after the other.

The instruction (`dot4.py`, `mma.py`) decides how a work-group multiplies and which sums a thread
holds.
"""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..formats import BLOCK, DIGIT, FP4_PER_WORD, INT8_PER_WORD, half_e8m0_to_float32, is_few
from ..product import OPS, Product, whole_parts
from ..records import Choose
from . import dot4, mma
from .packed_bytes import fp4_signed_bytes
from .row_tiles import RowTiles
from .shared import WORDS, place
from .tail import with_tail

INSTRUCTIONS = {"dot4": dot4, "mma": mma}  # named as in `Target.int8_dot`
DEPTHS = (1, 2, 3, 4)  # blocks at a time
VECTOR = 4  # words in a load


def tiles_int8(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` with a symbolic number of rows of quantised activations.

    Declines others, columns that do not fill tiles, and targets without a product of bytes.
    """
    if str(function.attrs["op"]) not in OPS or target.int8_dot not in INSTRUCTIONS:
        return None
    product = Product(function)
    width = INSTRUCTIONS[target.int8_dot].TILE_COLUMNS
    fits = product.columns % (width * min(INSTRUCTIONS[target.int8_dot].COLUMNS_EACH)) == 0
    if is_few(product.num_rows) or "xq" not in product.tensors or not fits:
        return None
    return with_tail(function, _body(product, target, choose), target, choose)


def _body(product: Product, target: Target, choose: Choose) -> Stmt:
    assert target.int8_dot is not None
    instruction = INSTRUCTIONS[target.int8_dot]
    xq, xs, words, scales, out = (
        product.tensors[n] for n in ("xq", "xs", "words", "scales", "out")
    )
    halves, threads = product.halves, instruction.THREADS
    fp4, digits = product.expert is not None, product.digits
    rows = choose("rows_each", instruction.ROWS_EACH, 4)
    columns = choose(
        "columns_each",
        *whole_parts(
            product.columns // instruction.TILE_COLUMNS,
            instruction.COLUMNS_EACH,
            instruction.COLUMNS_WANTED // halves,
        ),
    )
    depth = choose("blocks_together", *whole_parts(product.blocks, DEPTHS, 2))
    tile_rows, tile_columns = rows * instruction.TILE_ROWS, columns * instruction.TILE_COLUMNS
    weight_rows = halves * tile_columns
    tiles = RowTiles(product, tile_rows)
    together, fragment_shape = instruction.ROWS_TOGETHER, instruction.fragment_shape
    load, multiply = instruction.load(halves, columns), instruction.multiply(halves, rows, columns)
    row_at, column_at = instruction.row, instruction.column

    def weight_at(expert: Expr, group: Expr, r: Expr, block: Expr) -> tuple[Expr, ...]:
        """Return the first indices of a block in row r of a tile's weights."""
        column = group * tile_columns + r % tile_columns
        return product.weight_at(expert, r // tile_columns, column, block)

    def wanted(tile: Expr, thread: Expr, m: Expr, first: Expr) -> Expr:
        """Whether any row that is multiplied the m-th time has the expert."""
        begin, last = instruction.span(thread, m, rows)
        return tiles.touches(tile, begin, last, first)

    def weight_bytes(loaded: Buffer, k: Expr) -> Expr:
        """Return the k-th four weights of a block as bytes."""
        return fp4_signed_bytes(loaded[k // 2], k % 2, target) if fp4 else loaded[k]

    def activations(flat: Buffer, row: Expr, block: Expr, k: Expr) -> Expr:
        """Load the k-th `VECTOR` words of a block; `block` counts over blocks and digits."""
        at = (row * product.blocks * digits + block) * WORDS + k * VECTOR
        return flat.vload([at], f"uint32x{VECTOR}")

    def weight_scale(at: tuple[Expr, ...]) -> Expr:
        return half_e8m0_to_float32(scales[at]) if fp4 else scales[at].astype("float32")

    stored = BLOCK // (FP4_PER_WORD if fp4 else INT8_PER_WORD)  # words in a block of weights
    num_weights, num_activations = depth * weight_rows, depth * digits * tile_rows

    def steps(tile: Expr, first: Expr) -> Expr:
        """Return in how many steps the tile's rows of an expert are multiplied: in none, if `first`
        is not the first of them."""
        count = T.int64(product.blocks // depth)
        return T.if_then_else(tiles.begins(tile, first), count, T.int64(0))

    # `number` counts blocks of weights, or of activations, of a step over blocks and rows.
    @T.macro
    def load_weight(weight, scale, word, expert, group, step, number):  # type: ignore[no-untyped-def]
        for k in T.unroll(stored // VECTOR):
            word[k * VECTOR : k * VECTOR + VECTOR] = words.vload(
                [
                    *weight_at(
                        expert, group, number % weight_rows, step * depth + number // weight_rows
                    ),
                    k * VECTOR,
                ],
                f"uint32x{VECTOR}",
            )
        for k in T.unroll(WORDS):
            weight[number // weight_rows, number % weight_rows, place(number, k)] = weight_bytes(
                word, k
            )
        scale[number // weight_rows, number % weight_rows] = weight_scale(
            weight_at(expert, group, number % weight_rows, step * depth + number // weight_rows)
        )

    @T.macro
    def load_weights(weight, scale, word, expert, group, thread, step):  # type: ignore[no-untyped-def]
        for i in range(T.int64(-(-num_weights // threads))):
            if i * threads + thread < num_weights:
                load_weight(weight, scale, word, expert, group, step, i * threads + thread)

    @T.macro
    def load_block(x, flat, tile, step, number):  # type: ignore[no-untyped-def]
        for k in T.unroll(WORDS // VECTOR):
            x[
                number // tile_rows // digits,
                number // tile_rows % digits,
                number % tile_rows,
                place(number, k * VECTOR) : place(number, k * VECTOR) + VECTOR,
            ] = activations(
                flat,
                tiles.row(tile, number % tile_rows),
                step * depth * digits + number // tile_rows,
                k,
            )

    @T.macro
    def load_activations(x, x_scale, flat, tile, thread, step):  # type: ignore[no-untyped-def]
        for i in range(T.int64(-(-num_activations // threads))):
            if i * threads + thread < num_activations:
                load_block(x, flat, tile, step, i * threads + thread)
        for i in range(T.int64(-(-depth * tile_rows // threads))):
            if i * threads + thread < depth * tile_rows:
                x_scale[(i * threads + thread) // tile_rows, (i * threads + thread) % tile_rows] = (
                    xs[
                        tiles.row(tile, (i * threads + thread) % tile_rows),
                        step * depth + (i * threads + thread) // tile_rows,
                    ]
                )

    @T.macro
    def add_digit(total, x, fragment, thread, b, digit, m):  # type: ignore[no-untyped-def]
        for h in T.unroll(halves):
            for r in T.unroll(together):
                for c in T.unroll(columns):
                    total[h, r, c] = total[h, r, c] * DIGIT
        multiply(total, x, fragment, thread, b, digit, m)

    @T.macro
    def add_rows(acc, total, x, x_scale, fragment, scale, thread, b, m):  # type: ignore[no-untyped-def]
        for h in T.unroll(halves):
            for r in T.unroll(together):
                for c in T.unroll(columns):
                    total[h, r, c] = 0
        for digit in T.unroll(digits):
            add_digit(total, x, fragment, thread, b, digit, m)
        for h in T.unroll(halves):
            for r in T.unroll(together):
                for c in T.unroll(columns):
                    acc[h, m * together + r, c] += (
                        T.Cast("float32", total[h, r, c])
                        * scale[b, h * tile_columns + column_at(thread, c, columns)]
                        * x_scale[b, row_at(thread, m * together + r, rows)]
                    )

    @T.macro
    def add_block(acc, total, x, x_scale, fragment, weight, scale, active, thread, b):  # type: ignore[no-untyped-def]
        load(fragment, weight, thread, b)
        for m in T.unroll(rows // together):
            if active[m] != 0:
                add_rows(acc, total, x, x_scale, fragment, scale, thread, b, m)

    @T.macro
    def keep(acc, tile, group, thread, first):  # type: ignore[no-untyped-def]
        for r in T.unroll(rows):
            if tiles.belongs(tile, row_at(thread, r, rows), first):
                for c in T.unroll(columns):
                    out[
                        tile * tile_rows + row_at(thread, r, rows),
                        group * tile_columns + column_at(thread, c, columns),
                    ] = product.output(
                        tile * tile_rows + row_at(thread, r, rows),
                        group * tile_columns + column_at(thread, c, columns),
                        lambda half: acc[half, r, c],
                    )

    @T.macro
    def compute(flat, tile, group, thread):  # type: ignore[no-untyped-def]
        weight = T.alloc_buffer((depth, weight_rows, WORDS), "uint32", scope="shared")
        scale = T.alloc_buffer((depth, weight_rows), "float32", scope="shared")
        x = T.alloc_buffer((depth, digits, tile_rows, WORDS), "uint32", scope="shared")
        x_scale = T.alloc_buffer((depth, tile_rows), "float32", scope="shared")
        expert = T.alloc_buffer((1,), "int64", scope="local")
        word = T.alloc_buffer((stored,), "uint32", scope="local")
        active = T.alloc_buffer((rows // together,), "int32", scope="local")
        fragment = T.alloc_buffer(fragment_shape(halves, columns), "uint32", scope="local")
        total = T.alloc_buffer((halves, together, columns), "int32", scope="local")
        acc = T.alloc_buffer((halves, rows, columns), "float32", scope="local")
        for first in range(T.int64(tile_rows)):
            expert[0] = product.expert_of(tiles.row(tile, first))
            for m in T.unroll(rows // together):
                active[m] = T.Cast("int32", wanted(tile, thread, m, first))
            for h, r, c in T.grid(halves, rows, columns):
                acc[h, r, c] = T.float32(0)
            for step in range(steps(tile, first)):
                load_weights(weight, scale, word, expert[0], group, thread, step)
                load_activations(x, x_scale, flat, tile, thread, step)
                for b in range(T.int64(depth)):
                    add_block(acc, total, x, x_scale, fragment, weight, scale, active, thread, b)
            if tiles.begins(tile, first):
                keep(acc, tile, group, thread, first)

    num_blocks = product.num_rows * product.blocks * digits

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        flat = T.decl_buffer((num_blocks * WORDS,), "uint32", data=xq.data)
        for tile in T.thread_binding(tiles.count(), thread="blockIdx.y"):
            for group in T.thread_binding(
                T.int64(product.columns // tile_columns), thread="blockIdx.x"
            ):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    compute(flat, tile, group, thread)

    return body.body
