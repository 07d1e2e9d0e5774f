"""The steps of a tile's product of bfloat16: copies into a ring of stages, stored weights unpacked
into registers, products by the matrix units."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from . import wgmma
from .bf16_tile import Tile
from .weight_words import PAIRS
from .wgmma import PIECE


@dataclass(frozen=True)
class At:
    """Which weights a thread has a part of."""

    expert: Expr
    group: Expr
    thread: Expr


@dataclass(frozen=True)
class Ring:
    """The stages in shared memory, their description for the matrix units, and the rows of the
    activations that a thread copies into them."""

    shared: Buffer
    described: Buffer
    sources: Buffer


@dataclass(frozen=True)
class Weights:
    """A thread's: the stored words of a step, the scales of this step and of the next, and pairs
    for the two halves of a step, which are unpacked and multiplied by turns."""

    word: Buffer
    scale: Buffer
    pairs: Buffer


def multiply(tile: Tile) -> Callable[..., object]:
    """Return statements that add all products of a tile to a thread's sums."""
    ahead, num_sources = tile.stages - 2, tile.rows * 8 // tile.threads
    copy, load_scales, run_step = _copy(tile), _load_scales(tile), _step(tile)

    @T.macro
    def run_steps(sums, ring, weights, at):  # type: ignore[no-untyped-def]
        for s in T.unroll(ahead):
            copy(ring, at, s)
        load_scales(weights, at, 0)
        for s in range(tile.steps):
            run_step(sums, ring, weights, at, s)
        T.evaluate(T.call_extern("void", wgmma.FINISH[tile.rows], T.address_of(sums[0])))

    @T.macro
    def add_products(sums, shared, first, end, expert, group, thread):  # type: ignore[no-untyped-def]
        described = T.alloc_buffer((1,), "uint64", scope="local")
        sources = T.alloc_buffer((num_sources,), "int32", scope="local")
        word = T.alloc_buffer((2, tile.format.words), "uint32", scope="local")
        scale = T.alloc_buffer((2, 2), tile.format.scale_dtype, scope="local")
        pairs = T.alloc_buffer((2, 2, 4), "uint32", scope="local")
        described[0] = T.call_extern("uint64", wgmma.DESCRIBE, shared.data)
        for i in T.unroll(num_sources):
            sources[i] = _source(tile, T.min(first + tile.copied(thread, i), end - 1))
        run_steps(
            sums,
            Ring(shared, described, sources),
            Weights(word, scale, pairs),
            At(expert, group, thread),
        )

    return add_products  # type: ignore[no-any-return]


def _step(tile: Tile) -> Callable[..., object]:
    """Return statements that start the products of step s, and wait for those before."""
    ahead = tile.stages - 2
    copy, load_words, load_scales = _copy(tile), _load_words(tile), _load_scales(tile)
    unpack, start = _unpack(tile), _start(tile)

    @T.macro
    def step(sums, ring, weights, at, s):  # type: ignore[no-untyped-def]
        T.evaluate(T.call_extern("void", f"{wgmma.COPY_WAIT}<{ahead - 1}>"))
        T.evaluate(T.call_extern("void", wgmma.SHOW))
        T.tvm_storage_sync("shared")  # from here, nobody reads the stage before the last
        copy(ring, at, s + ahead)
        load_words(weights, ring, at, s)
        for i in T.unroll(2):
            weights.scale[0, i] = weights.scale[1, i]
        load_scales(weights, at, s + 1)
        for v in T.unroll(2):
            unpack(weights, v)
            start(sums, ring, weights, s, v)
            T.evaluate(T.call_extern("void", wgmma.WAIT))

    return step  # type: ignore[no-any-return]


def _start(tile: Tile) -> Callable[..., object]:
    """Return statements that start the products of the v-th half of step s."""
    stage_units = tile.stage_words * 4 // wgmma.DESCRIBED

    def activations(ring: Ring, s: Expr, k: Expr) -> Expr:
        """Describe the activations of the k-th product of a step."""
        inputs = k * (wgmma.INPUTS * 2 // wgmma.DESCRIBED)
        return ring.described[0] + (s % tile.stages * stage_units + inputs).astype("uint64")

    @T.macro
    def start(sums, ring, weights, s, v):  # type: ignore[no-untyped-def]
        T.evaluate(T.call_extern("void", wgmma.BEGIN))
        for k in T.unroll(2):
            T.evaluate(
                T.call_extern(
                    "void",
                    wgmma.MULTIPLY[tile.rows],
                    T.address_of(sums[0]),
                    T.address_of(weights.pairs[v, k, 0]),
                    activations(ring, s, v * 2 + k),
                )
            )
        T.evaluate(T.call_extern("void", wgmma.COMMIT))

    return start  # type: ignore[no-any-return]


def _source(tile: Tile, row: Expr) -> Expr:
    """Return the row of the activations that a row multiplies."""
    row_token = tile.product.tensors.get("row_token")
    return row.astype("int32") if row_token is None else row_token[row]


def _copy(tile: Tile) -> Callable[..., object]:
    """Return statements that start the copies of a step's stage. Steps past the last copy the last
    again, into a stage that nobody reads any more."""
    threads, stages = tile.threads, tile.stages
    xb, words = tile.product.tensors["xb"], tile.product.tensors["words"]
    of_block = int(words.shape[-1]) // PIECE

    def activations(ring: Ring, at: At, s: Expr, i: Expr) -> tuple[Expr, Expr]:
        """Return where the i-th of a thread's pieces of activations goes, and from where."""
        place = wgmma.swizzled(tile.copied(at.thread, i), at.thread % 8)
        to = ring.shared[s % stages * tile.stage_words + place]
        return to, xb[ring.sources[i], tile.existing(s), at.thread % 8 * 8]

    def weights(ring: Ring, at: At, s: Expr, i: Expr) -> tuple[Expr, Expr]:
        """Return the same for pieces of stored words."""
        number = i * threads + at.thread
        piece = number % tile.pieces
        to = ring.shared[s % stages * tile.stage_words + tile.stored(number * PIECE)]
        indices = tile.weights(at.expert, at.group, number // tile.pieces, s, piece // of_block)
        return to, words[(*indices, piece % of_block * PIECE)]

    def copied(to: Expr, source: Expr) -> Expr:
        return T.call_extern("void", wgmma.COPY, T.address_of(to), T.address_of(source))

    @T.macro
    def copy(ring, at, s):  # type: ignore[no-untyped-def]
        for i in T.unroll(tile.rows * 8 // threads):
            T.evaluate(copied(*activations(ring, at, s, i)))
        for i in T.unroll(tile.pieces // 2):
            T.evaluate(copied(*weights(ring, at, s, i)))
        T.evaluate(T.call_extern("void", wgmma.COPY_COMMIT))

    return copy  # type: ignore[no-any-return]


def _load_scales(tile: Tile) -> Callable[..., object]:
    """Return statements that load the scales of step s for a thread's two rows."""
    scales = tile.product.tensors["scales"]

    def scale(at: At, s: Expr, i: Expr) -> Expr:
        block = wgmma.quarter(at.thread) // 2
        indices = tile.weights(at.expert, at.group, tile.row(at.thread, i), s, block)
        return tile.format.scale(scales[indices])

    @T.macro
    def load_scales(weights, at, s):  # type: ignore[no-untyped-def]
        for i in T.unroll(2):
            weights.scale[1, i] = scale(at, s, i)

    return load_scales  # type: ignore[no-any-return]


def _load_words(tile: Tile) -> Callable[..., object]:
    """Return statements that load the stored words of step s for a thread's two rows."""
    words = tile.format.words

    def stored(ring: Ring, thread: Expr, s: Expr, i: Expr) -> Expr:
        row = tile.row(thread, i) * (tile.pieces * PIECE)
        at = s % tile.stages * tile.stage_words + tile.stored(row + wgmma.quarter(thread) * words)
        return ring.shared.vload([at], f"uint32x{words}")

    @T.macro
    def load_words(weights, ring, at, s):  # type: ignore[no-untyped-def]
        for i in T.unroll(2):
            weights.word[i, 0:words] = stored(ring, at.thread, s, i)

    return load_words  # type: ignore[no-any-return]


def _unpack(tile: Tile) -> Callable[..., object]:
    """Return statements that turn the words of the v-th half of a step into pairs."""

    def pair(weights: Weights, i: Expr, v: Expr, n: Expr) -> Expr:
        return tile.format.pair(lambda w: weights.word[i, w], v, n, weights.scale[0, i])

    @T.macro
    def unpack(weights, v):  # type: ignore[no-untyped-def]
        for i in T.unroll(2):
            for n in T.unroll(PAIRS):
                weights.pairs[v, n // 2, n % 2 * 2 + i] = pair(weights, i, v, n)

    return unpack  # type: ignore[no-any-return]
