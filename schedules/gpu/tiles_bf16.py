"""Matrix products of many rows of bfloat16 activations, on GPUs whose matrix units take them: a
work-group computes a tile of columns x rows of one expert.

Each of its warpgroups has 64 rows of weights, which it turns into bfloat16 in registers. Stored
weights and activations pass through a ring of stages in shared memory, into which copies run
ahead: while the units multiply the inputs of a step, threads unpack the weights of the next.

Where a kernel has two halves (gate and up), a thread's two rows of weights are those of the same
column, so that it has both of their sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..formats import BLOCK, PANEL, const, float32_to_bf16, is_few, panel_input
from ..product import Product
from ..records import Choose
from ..tail import rooted
from . import wgmma
from .expert_tiles import list_tiles, tile_list
from .tail import with_tail
from .weight_words import PAIRS, Fp4Words, Int8Words
from .wgmma import PIECE, ROW_WORDS, STEP

OPS = ("dense_int8_bf16", "moe_mxfp4_swiglu_bf16", "moe_mxfp4_sum_bf16")
WARPGROUPS = (1, 2, 4)
ROWS = (64, 128)  # of activations in a tile
STAGES = (3, 4, 6, 8)


def tiles_bf16(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` for a symbolic number of rows; declines others."""
    if str(function.attrs["op"]) not in OPS or target.bf16_matrix != "wgmma":
        return None
    product = Product(function)
    if is_few(product.num_rows):
        return None
    warpgroups = choose("warpgroups", WARPGROUPS, 2)
    rows = choose("rows_together", ROWS, 128)
    tile = Tile(product, warpgroups, rows, 1)
    fitting = [n for n in STAGES if n * tile.stage_words * 4 <= target.shared_bytes]
    tile = replace(tile, stages=choose("stages", fitting, 4))
    if product.expert is None:
        return with_tail(function, _body(tile, None), target, choose)
    experts = int(product.tensors["words"].shape[0])
    listed = tile_list(product, experts, rows)
    launches = [list_tiles(product, listed, experts, rows), _body(tile, listed)]
    body = rooted(launches, [listed])
    if product.halves == 2:  # which writes panels itself
        return Schedule(function.with_body(body))
    return with_tail(function, body, target, choose)


@dataclass(frozen=True)
class Tile:
    """Where a work-group's numbers lie. A stage of its shared memory holds the rows of activations
    of a step, and after them the stored words of its rows of weights."""

    product: Product
    warpgroups: int
    rows: int
    stages: int

    @property
    def threads(self) -> int:
        return self.warpgroups * wgmma.THREADS

    @property
    def columns(self) -> int:
        return self.warpgroups * wgmma.ROWS // self.product.halves

    @property
    def groups(self) -> int:
        """Tiles side by side; the last may have places that do not exist."""
        return -(-self.places // self.columns)

    @property
    def places(self) -> int:
        """Of a row of results in memory: its columns, or whole panels."""
        if self.product.halves == 1:
            return self.product.columns
        return -(-self.product.columns // PANEL) * PANEL

    @property
    def steps(self) -> int:
        return -(-self.product.blocks * BLOCK // STEP)

    @property
    def format(self) -> type[Fp4Words] | type[Int8Words]:
        return Int8Words if self.product.expert is None else Fp4Words

    @property
    def pieces(self) -> int:
        """Pieces of stored words in a row of weights and a step."""
        return self.format.words * 4 // PIECE

    @property
    def stage_words(self) -> int:
        weights = self.warpgroups * wgmma.ROWS * self.pieces * PIECE
        return self.rows * ROW_WORDS + weights

    def half(self, row: Expr) -> Expr:
        return row // 8 % 2 if self.product.halves == 2 else const(0, "int64")

    def place(self, group: Expr, row: Expr) -> Expr:
        """Return which column, as results lie in memory, a row of weights computes."""
        if self.product.halves == 1:
            return group * self.columns + row
        return group * self.columns + row // 16 * 8 + row % 8

    def column(self, group: Expr, row: Expr) -> Expr:
        """Return the column of a row of weights; one that does not exist repeats the last."""
        place = self.place(group, row)
        if self.product.halves == 2:  # results are panels
            place = place // PANEL * PANEL + panel_input(place % PANEL)
        return T.min(place, const(self.product.columns - 1, "int64"))

    def weights(self, expert: Expr, group: Expr, row: Expr, block: Expr) -> tuple[Expr, ...]:
        """Return the indices of a block of a row of weights; what does not exist repeats the last,
        and its activations are zero."""
        block = T.min(block, const(self.product.blocks - 1, "int64"))
        return self.product.weight_at(expert, self.half(row), self.column(group, row), block)

    def stored(self, row: Expr, word: Expr) -> Expr:
        """Return where a word of a row of weights lies in a stage."""
        return self.rows * ROW_WORDS + row * (self.pieces * PIECE) + word


def _body(tile: Tile, listed: Buffer | None) -> Stmt:
    product, rows, threads = tile.product, tile.rows, tile.threads
    count = (product.num_rows + (rows - 1)) // rows if listed is None else listed.shape[0]
    compute = _compute(tile)

    def bound(number: Expr, side: int) -> Expr:
        if listed is not None:
            return listed[number, side].astype("int64")
        return T.min((number + side) * rows, product.num_rows)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for number in T.thread_binding(count, thread="blockIdx.y"):
            for group in T.thread_binding(T.int64(tile.groups), thread="blockIdx.x"):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    shared = T.alloc_buffer(
                        (tile.stages * tile.stage_words,), "uint32", scope="shared.dyn"
                    )
                    bounds = T.alloc_buffer((2,), "int64", scope="local")
                    for side in T.unroll(2):
                        bounds[side] = bound(number, side)
                    if bounds[0] < bounds[1]:
                        compute(shared, bounds[0], bounds[1], group, thread)

    return body.body


def _compute(tile: Tile) -> Callable[..., object]:
    """Return statements that compute the results of the rows [first, end). Where they are few, the
    products are of fewer."""
    multiply, write = _multiply(tile), _write(tile)

    @T.macro
    def compute_all(shared, first, end, group, thread):  # type: ignore[no-untyped-def]
        expert = T.alloc_buffer((1,), "int64", scope="local")
        sums = T.alloc_buffer((tile.rows // 2,), "float32", scope="local")
        expert[0] = tile.product.expert_of(first)
        for i in T.unroll(tile.rows // 2):
            sums[i] = T.float32(0)
        multiply(sums, shared, first, end, expert[0], group, thread)
        write(sums, first, end, expert[0], group, thread)

    if tile.rows == min(ROWS):
        return compute_all  # type: ignore[no-any-return]
    narrow = replace(tile, rows=max(n for n in ROWS if n < tile.rows))
    compute_few = _compute(narrow)

    @T.macro
    def compute(shared, first, end, group, thread):  # type: ignore[no-untyped-def]
        if end - first <= narrow.rows:
            compute_few(shared, first, end, group, thread)
        else:
            compute_all(shared, first, end, group, thread)

    return compute  # type: ignore[no-any-return]


def _multiply(tile: Tile) -> Callable[..., object]:
    """Return statements that add all products of a tile to a thread's sums."""
    steps, stages, ahead = tile.steps, tile.stages, tile.stages - 2
    words, dtype = tile.format.words, tile.format.scale_dtype
    copy, unpack = _copy(tile), _unpack(tile)
    load_scales = _load_scales(tile)

    @T.macro
    def step(sums, shared, described, word, scale, pairs, expert, group, thread, sources, s, p):  # type: ignore[no-untyped-def]
        """Start step s; p, by turns 0 and 1, says which registers hold its weights."""
        T.evaluate(T.call_extern("void", f"{wgmma.COPY_WAIT}<{ahead - 1}>"))
        T.evaluate(T.call_extern("void", wgmma.SHOW))
        T.tvm_storage_sync("shared")  # from here, nobody reads the stage before the last
        copy(shared, sources, expert, group, thread, s + ahead)
        unpack(pairs, word, scale, shared, thread, s, p)
        load_scales(scale, expert, group, thread, s + 2, p)
        T.evaluate(T.call_extern("void", wgmma.BEGIN))
        for k in T.unroll(STEP // wgmma.INPUTS):
            T.evaluate(
                T.call_extern(
                    "void",
                    wgmma.MULTIPLY[tile.rows],
                    T.address_of(sums[0]),
                    T.address_of(pairs[p, k, 0]),
                    described[0]
                    + T.Cast("uint64", s % stages * (tile.stage_words * 4 // wgmma.DESCRIBED))
                    + T.uint64(k * (wgmma.INPUTS * 2 // wgmma.DESCRIBED)),
                )
            )
        T.evaluate(T.call_extern("void", wgmma.COMMIT))
        T.evaluate(T.call_extern("void", wgmma.WAIT))

    @T.macro
    def multiply(sums, shared, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        described = T.alloc_buffer((1,), "uint64", scope="local")
        word = T.alloc_buffer((2, words), "uint32", scope="local")
        scale = T.alloc_buffer((2, 2), dtype, scope="local")
        pairs = T.alloc_buffer((2, 4, 4), "uint32", scope="local")
        sources = T.alloc_buffer((tile.rows * 8 // tile.threads,), "int64", scope="local")
        described[0] = T.call_extern("uint64", wgmma.DESCRIBE, shared.data)
        for i in T.unroll(tile.rows * 8 // tile.threads):
            sources[i] = _source(
                tile, T.min(first + i * (tile.threads // 8) + thread // 8, end - 1)
            )
        for s in T.unroll(ahead):
            copy(shared, sources, expert, group, thread, T.int64(s))
        for s in T.unroll(2):
            load_scales(scale, expert, group, thread, T.int64(s), (s + steps) % 2)
        for s in T.unroll(steps % 2):
            step(
                sums,
                shared,
                described,
                word,
                scale,
                pairs,
                expert,
                group,
                thread,
                sources,
                T.int64(s),
                1,
            )
        for pair in range(T.int64(steps // 2)):
            for p in T.unroll(2):
                step(
                    sums,
                    shared,
                    described,
                    word,
                    scale,
                    pairs,
                    expert,
                    group,
                    thread,
                    sources,
                    pair * 2 + steps % 2 + p,
                    p,
                )
        T.evaluate(T.call_extern("void", wgmma.FINISH[tile.rows], T.address_of(sums[0])))

    return multiply  # type: ignore[no-any-return]


def _source(tile: Tile, row: Expr) -> Expr:
    """Return the row of the activations that a row multiplies."""
    row_token = tile.product.tensors.get("row_token")
    return row if row_token is None else row_token[row].astype("int64")


def _copy(tile: Tile) -> Callable[..., object]:
    """Return statements that start the copies of a step's stage. Steps past the last copy the last
    again, into a stage that nobody reads any more."""
    threads, steps, stages = tile.threads, tile.steps, tile.stages
    xb, words = tile.product.tensors["xb"], tile.product.tensors["words"]
    pieces_of_block = int(words.shape[-1]) // PIECE

    def activations(row: Expr, s: Expr, piece: Expr) -> Expr:
        return T.address_of(xb[row, T.min(s, steps - 1), piece * 8])

    def weights(expert: Expr, group: Expr, number: Expr, s: Expr) -> Expr:
        row, piece = number // tile.pieces, number % tile.pieces
        block = s * (STEP // BLOCK) + piece // pieces_of_block
        at = tile.weights(expert, group, row, block)
        return T.address_of(words[(*at, piece % pieces_of_block * PIECE)])

    @T.macro
    def copy(shared, sources, expert, group, thread, s):  # type: ignore[no-untyped-def]
        for i in T.unroll(tile.rows * 8 // threads):
            T.evaluate(
                T.call_extern(
                    "void",
                    wgmma.COPY,
                    T.address_of(
                        shared[
                            s % stages * tile.stage_words
                            + wgmma.swizzled(i * (threads // 8) + thread // 8, thread % 8)
                        ]
                    ),
                    activations(sources[i], s, thread % 8),
                )
            )
        for i in T.unroll(tile.pieces // 2):
            T.evaluate(
                T.call_extern(
                    "void",
                    wgmma.COPY,
                    T.address_of(
                        shared[
                            s % stages * tile.stage_words
                            + tile.stored(T.int64(0), (i * threads + thread) * PIECE)
                        ]
                    ),
                    weights(expert, group, i * threads + thread, s),
                )
            )
        T.evaluate(T.call_extern("void", wgmma.COPY_COMMIT))

    return copy  # type: ignore[no-any-return]


def _row(thread: Expr, i: Expr) -> Expr:
    """Return a thread's i-th row of weights, as a row of the tile."""
    return thread // wgmma.THREADS * wgmma.ROWS + wgmma.row(thread) + i * 8


def _load_scales(tile: Tile) -> Callable[..., object]:
    """Return statements that load the scales of a step for a thread's two rows."""
    scales = tile.product.tensors["scales"]

    def stored(expert: Expr, group: Expr, thread: Expr, s: Expr, i: Expr) -> Expr:
        block = s * (STEP // BLOCK) + wgmma.quarter(thread) // 2
        return tile.format.scale(scales[tile.weights(expert, group, _row(thread, i), block)])

    @T.macro
    def load_scales(scale, expert, group, thread, s, p):  # type: ignore[no-untyped-def]
        for i in T.unroll(2):
            scale[p, i] = stored(expert, group, thread, s, i)

    return load_scales  # type: ignore[no-any-return]


def _unpack(tile: Tile) -> Callable[..., object]:
    """Return statements that turn a step's stored words into pairs of bfloat16."""
    words = tile.format.words

    @T.macro
    def unpack(pairs, word, scale, shared, thread, s, p):  # type: ignore[no-untyped-def]
        for i in T.unroll(2):
            word[i, 0:words] = shared.vload(
                [
                    s % tile.stages * tile.stage_words
                    + tile.stored(_row(thread, i), wgmma.quarter(thread) * words)
                ],
                f"uint32x{words}",
            )
        for i in T.unroll(2):
            for v in T.unroll(2):
                for n in T.unroll(PAIRS):
                    pairs[p, v * 2 + n // 2, n % 2 * 2 + i] = tile.format.pair(
                        lambda w: word[i, w], v, n, scale[p, i]
                    )

    return unpack  # type: ignore[no-any-return]


def _write(tile: Tile) -> Callable[..., object]:
    """Return statements that write a thread's results for the rows [first, end)."""
    return _write_panels(tile) if tile.product.halves == 2 else _write_floats(tile)


def _write_floats(tile: Tile) -> Callable[..., object]:
    product, out = tile.product, tile.product.out
    factor = const(tile.format.factor, "float32")

    def result(sums: Buffer, row: Expr, column: Expr, expert: Expr, i: Expr) -> Expr:
        return product.output(row, column, lambda half: sums[i] * factor, expert)

    @T.macro
    def write(sums, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        for i in T.unroll(tile.rows // 2):
            if T.And(
                first + wgmma.token(thread, i) < end,
                tile.place(group, _row(thread, i // 2 % 2)) < product.columns,
            ):
                out[first + wgmma.token(thread, i), tile.place(group, _row(thread, i // 2 % 2))] = (
                    result(
                        sums,
                        first + wgmma.token(thread, i),
                        tile.place(group, _row(thread, i // 2 % 2)),
                        expert,
                        i,
                    )
                )

    return write  # type: ignore[no-any-return]


def _write_panels(tile: Tile) -> Callable[..., object]:
    """For two halves: sums i and i + 2 are of the same row and column."""
    product, panels = tile.product, tile.product.tensors["xb_out"]
    factor = const(tile.format.factor, "float32")

    def result(sums: Buffer, row: Expr, place: Expr, expert: Expr, i: Expr) -> Expr:
        column = place // PANEL * PANEL + panel_input(place % PANEL)
        at = T.min(column, const(product.columns - 1, "int64"))
        value = product.output(row, at, lambda half: sums[i + half * 2] * factor, expert)
        bits = float32_to_bf16(value)
        return T.Select(column < product.columns, bits, const(0, "uint16"))

    @T.macro
    def write(sums, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        for j in T.unroll(tile.rows // 8):
            for side in T.unroll(2):
                if T.And(
                    first + wgmma.token(thread, j * 4 + side) < end,
                    tile.place(group, _row(thread, 0)) < tile.places,
                ):
                    panels[
                        first + wgmma.token(thread, j * 4 + side),
                        tile.place(group, _row(thread, 0)) // PANEL,
                        tile.place(group, _row(thread, 0)) % PANEL,
                    ] = result(
                        sums,
                        first + wgmma.token(thread, j * 4 + side),
                        tile.place(group, _row(thread, 0)),
                        expert,
                        j * 4 + side,
                    )

    return write  # type: ignore[no-any-return]
