"""The steps of a product of bfloat16 with few rows of activations: strips of weights are copied
into stages of shared memory, unpacked, and multiplied by every warp with its panels of the
activations, which its threads hold."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import PANEL, const
from . import mma_bf16, wgmma
from .few_tile import PIECE_BYTES, FewTile
from .weight_words import PAIRS, Fp4Words
from .wgmma import PIECE

PRODUCTS = PANEL // 16  # that the inputs of a panel take
PANEL_WORDS = PANEL // 2


@dataclass(frozen=True)
class Stored:
    """Weights in memory, in one row: words, and scales as they are stored."""

    words: Buffer
    scales: Buffer


@dataclass(frozen=True)
class Lane:
    """A thread by its warp and its place there."""

    warp: Expr
    lane: Expr


def copy_strip(tile: FewTile) -> Callable[..., object]:
    """Return statements that start the copies of a strip into a stage."""
    product, threads = tile.product, tile.threads
    row_pieces = tile.row_words // PIECE
    half_pieces, scale_pieces = tile.columns * row_pieces, tile.scale_bytes // PIECE_BYTES
    item = PIECE_BYTES // (1 if tile.format is Fp4Words else 2)  # scales in a piece

    def column(expert: Expr, half: Expr, strip: Expr) -> Expr:
        """Return the first column of a strip, counted over halves and experts."""
        return (expert * product.halves + half) * product.columns + strip * tile.columns

    @T.macro
    def copy_words(shared, stored, expert, strip, stage, number):  # type: ignore[no-untyped-def]
        T.evaluate(
            T.call_extern(
                "void",
                wgmma.COPY,
                T.address_of(
                    shared[stage + number // row_pieces * tile.stride + number % row_pieces * PIECE]
                ),
                T.address_of(
                    stored.words[
                        column(expert, number // half_pieces, strip) * tile.row_words
                        + number % half_pieces * PIECE
                    ]
                ),
            )
        )

    @T.macro
    def copy_scales(shared, stored, expert, strip, stage, number):  # type: ignore[no-untyped-def]
        T.evaluate(
            T.call_extern(
                "void",
                wgmma.COPY,
                T.address_of(shared[stage + mma_bf16.ROWS * tile.stride + number * PIECE]),
                T.address_of(
                    stored.scales[
                        column(expert, number // scale_pieces, strip) * product.blocks
                        + number % scale_pieces * item
                    ]
                ),
            )
        )

    @T.macro
    def copy_pieces(copy_piece, count, shared, stored, expert, strip, stage, thread):  # type: ignore[no-untyped-def]
        for i in T.unroll(-(-count // threads)):
            if i * threads + thread < count:
                copy_piece(shared, stored, expert, strip, stage, i * threads + thread)

    num_words, num_scales = product.halves * half_pieces, product.halves * scale_pieces

    @T.macro
    def copy(shared, stored, expert, strip, stage, thread):  # type: ignore[no-untyped-def]
        copy_pieces(copy_words, num_words, shared, stored, expert, strip, stage, thread)
        copy_pieces(copy_scales, num_scales, shared, stored, expert, strip, stage, thread)

    return copy  # type: ignore[no-any-return]


def load_activations(tile: FewTile) -> Callable[..., object]:
    """Return statements that load a thread's part of the activations of the rows [first, end): zero
    for rows and panels that do not exist."""
    row_token = tile.product.tensors.get("row_token")

    def source(row: Expr) -> Expr:
        return row if row_token is None else row_token[row].astype("int64")

    def words(xb: Buffer, row: Expr, end: Expr, at: Lane, i: Expr, k: Expr) -> Expr:
        """Return the k-th word of a thread's i-th panel."""
        exists = T.And(row < end, i * tile.warps + at.warp < tile.panels)
        place = k * 4 + mma_bf16.quarter(at.lane)
        loaded = xb[(source(row) * tile.panels + tile.panel(at.warp, i)) * PANEL_WORDS + place]
        return T.if_then_else(exists, loaded, const(0, "uint32"))

    @T.macro
    def load(x, xb, first, end, at):  # type: ignore[no-untyped-def]
        for i in T.unroll(tile.panels_each):
            for j in T.unroll(tile.rows // mma_bf16.TOKENS):
                for k in T.unroll(PRODUCTS * 2):
                    x[i, j, k] = words(
                        xb,
                        first + j * mma_bf16.TOKENS + mma_bf16.row(at.lane),
                        end,
                        at,
                        i,
                        k,
                    )

    return load  # type: ignore[no-any-return]


def multiply_strip(tile: FewTile) -> Callable[..., object]:
    """Return statements that set a thread's sums to the products of a strip, over its warp's
    panels."""
    load_words, load_scales, unpack = _load_words(tile), _load_scales(tile), _unpack(tile)
    groups = tile.rows // mma_bf16.TOKENS

    @T.macro
    def add_products(sums, x, pairs, i):  # type: ignore[no-untyped-def]
        for k in T.unroll(PRODUCTS):
            for j in T.unroll(groups):
                T.evaluate(
                    T.call_extern(
                        "void",
                        mma_bf16.MMA,
                        T.address_of(sums[j * mma_bf16.SUMS]),
                        T.address_of(pairs[k, 0]),
                        T.address_of(x[i, j, k * 2]),
                    )
                )

    @T.macro
    def multiply(sums, x, shared, stage, at):  # type: ignore[no-untyped-def]
        word = T.alloc_buffer((2, tile.format.words), "uint32", scope="local")
        scale = T.alloc_buffer((2,), tile.format.scale_dtype, scope="local")
        pairs = T.alloc_buffer((PRODUCTS, 4), "uint32", scope="local")
        for i in T.unroll(tile.num_sums):
            sums[i] = T.float32(0)
        for i in T.unroll(tile.panels_each):
            load_words(word, shared, stage, at, i)
            load_scales(scale, shared, stage, at, i)
            unpack(pairs, word, scale)
            add_products(sums, x, pairs, i)

    return multiply  # type: ignore[no-any-return]


def _load_words(tile: FewTile) -> Callable[..., object]:
    words = tile.format.words

    def stored(shared: Buffer, stage: Expr, at: Lane, i: Expr, r: Expr) -> Expr:
        row = mma_bf16.row(at.lane) + r * 8
        place = tile.word(row, tile.panel(at.warp, i), mma_bf16.quarter(at.lane))
        return shared.vload([stage + place], f"uint32x{words}")

    @T.macro
    def load_words(word, shared, stage, at, i):  # type: ignore[no-untyped-def]
        for r in T.unroll(2):
            word[r, 0:words] = stored(shared, stage, at, i, r)

    return load_words  # type: ignore[no-any-return]


def _load_scales(tile: FewTile) -> Callable[..., object]:
    bits = 8 if tile.format is Fp4Words else 16

    def scale(shared: Buffer, stage: Expr, at: Lane, i: Expr, r: Expr) -> Expr:
        row = mma_bf16.row(at.lane) + r * 8
        number = tile.scale(row, tile.panel(at.warp, i), mma_bf16.quarter(at.lane))
        of_word = 32 // bits
        word = shared[stage + mma_bf16.ROWS * tile.stride + number // of_word]
        stored = word >> (number % of_word * bits).astype("uint32")
        if bits == 16:
            return tile.format.scale(T.reinterpret(stored.astype("uint16"), dtype="float16"))
        return tile.format.scale(stored & const(255, "uint32"))

    @T.macro
    def load_scales(scales, shared, stage, at, i):  # type: ignore[no-untyped-def]
        for r in T.unroll(2):
            scales[r] = scale(shared, stage, at, i, r)

    return load_scales  # type: ignore[no-any-return]


def _unpack(tile: FewTile) -> Callable[..., object]:
    """Return statements that turn the words of a panel into pairs, by products."""

    def pair(word: Buffer, scale: Buffer, r: Expr, v: Expr, n: Expr) -> Expr:
        return tile.format.pair(lambda w: word[r, w], v, n, scale[r])

    @T.macro
    def unpack(pairs, word, scale):  # type: ignore[no-untyped-def]
        for v in T.unroll(2):
            for n in T.unroll(PAIRS):
                for r in T.unroll(2):
                    pairs[v * 2 + n // 2, n % 2 * 2 + r] = pair(word, scale, r, v, n)

    return unpack  # type: ignore[no-any-return]
