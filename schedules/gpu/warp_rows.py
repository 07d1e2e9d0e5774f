"""A warp's rows in attention by matrix units that multiply float16 (`mma_f16.py`), in bands of 16.

Between a page's two products, scores = queries x keys and weights x values, the softmax goes on
from page to page (online), in registers: what a lane holds of the scores is what it must hold of
the weights. At the end the sink, a logit without a value, adds to the mass.

Keys and values are multiplied as the cache has them, in float16. Queries and weights are rounded to
it: it has three bits more than bfloat16, weights are at most 1, and queries, which are scaled, are
smaller than keys. The sums of weights are those of the rounded ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from . import mma_f16
from .mma import WARP, product
from .mma_f16 import COLUMNS, DEPTH
from .page_ring import PageRing
from .token_tiles import HIDDEN, TokenTiles

LEAST = -1e20  # the maximum before the first key; above `HIDDEN`, so that hidden keys weigh 0
LOG2_E = math.log2(math.e)
ONES = 0x3C003C00  # two of float16
_ALL = 0xFFFFFFFF


@dataclass(frozen=True)
class Rows:
    """What a lane holds of its warp's rows: two of each band's 16, and some of their columns."""

    query: Buffer  # [bands, head_dim / 16, 4] words
    score: Buffer  # [bands, keys of a page / 8, 4]
    weight: Buffer  # [bands, keys of a page / 16, 4] words
    total: Buffer  # [bands, head_dim / 8, 4], of the weighted values
    last: Buffer  # [bands, 2], the keys that rows see last
    best: Buffer  # [bands, 2], the greatest score yet
    mass: Buffer  # [bands, 4], sums of the weights, each twice
    exist: Buffer  # whether the tile has any row of the warp


@dataclass(frozen=True)
class WarpRows:
    """How a warp computes its `bands` of rows of a tile. What it does comes as statements."""

    tiles: TokenTiles
    ring: PageRing
    bands: int

    def row(self, thread: Expr, band: Expr, side: Expr) -> Expr:
        """Return a lane's row in the tile."""
        first = (thread // WARP * self.bands + band) * mma_f16.ROWS
        return first + mma_f16.row(thread, side)

    def load(self) -> Callable[..., object]:
        """Return statements that load the rows' queries, and begin the softmax."""
        tiles, bands = self.tiles, self.bands
        load_words = self._load_words()

        @T.macro
        def load(rows, kv_head, tile, thread):  # type: ignore[no-untyped-def]
            exist = tiles.kept(tile, thread // WARP * bands * mma_f16.ROWS)
            rows.exist[0] = exist.astype("int32")
            for band in T.unroll(bands):
                load_words(rows, kv_head, tile, thread, band)
                for n in T.unroll(tiles.head_dim // COLUMNS):
                    for i in T.unroll(4):
                        rows.total[band, n, i] = T.float32(0)
                for side in T.unroll(2):
                    last = tiles.last_key(tile, self.row(thread, band, side))
                    rows.last[band, side] = last.astype("int32")
                    rows.best[band, side] = T.float32(LEAST)
                for i in T.unroll(4):
                    rows.mass[band, i] = T.float32(0)

        return load  # type: ignore[no-any-return]

    def _load_words(self) -> Callable[..., object]:
        """Return statements that load the queries of a band's rows."""
        tiles = self.tiles

        def two(kv_head: Expr, tile: Expr, thread: Expr, band: Expr, k: Expr, i: Expr) -> Expr:
            """Return two neighbouring numbers: word i of 16 inputs of a lane's rows."""
            row = self.row(thread, band, i % 2)
            d = k * DEPTH + i // 2 * 8 + mma_f16.first_column(thread)
            at = [tiles.token_of(tile, row), tiles.head_of(kv_head, row), d]
            return tiles.queries.vload(at, "float32x2")

        @T.macro
        def load_words(rows, kv_head, tile, thread, band):  # type: ignore[no-untyped-def]
            pair = T.alloc_buffer((2,), "float32", scope="local")
            for k in T.unroll(tiles.head_dim // DEPTH):
                for i in T.unroll(4):
                    pair[0:2] = two(kv_head, tile, thread, band, k, i)
                    rows.query[band, k, i] = _packed(pair[0], pair[1])

        return load_words  # type: ignore[no-any-return]

    def add_page(self) -> Callable[..., object]:
        """Return statements that add a tile's page c, which begins with key `start` and has keys
        that some rows must not see only if `some_hidden`."""
        bands = self.bands
        score, hide, weigh, add_values = self._score(), self._hide(), self._weigh(), self._add()

        @T.macro
        def add_page(rows, shared, c, start, some_hidden, thread):  # type: ignore[no-untyped-def]
            score(rows, shared, c, thread)
            if some_hidden:
                for band in T.unroll(bands):
                    hide(rows, start, thread, band)
            for band in T.unroll(bands):
                weigh(rows, band)
            add_values(rows, shared, c, thread)

        return add_page  # type: ignore[no-any-return]

    def _score(self) -> Callable[..., object]:
        """Return statements that compute the scores of page c."""
        bands, columns = self.bands, self.tiles.per_page // mma_f16.LOADED_COLUMNS
        multiply, load_keys = mma_f16.multiply(bands), self.ring.load_keys()
        depth = self.tiles.head_dim // DEPTH

        @T.macro
        def score(rows, shared, c, thread):  # type: ignore[no-untyped-def]
            words = T.alloc_buffer((4,), "uint32", scope="local")
            for band in T.unroll(bands):
                for n in T.unroll(columns * 2):
                    for i in T.unroll(4):
                        rows.score[band, n, i] = T.float32(0)
            for k in T.unroll(depth):
                for n in T.unroll(columns):
                    load_keys(words, shared, c, k, n, thread)
                    multiply(rows.score, rows.query, words, k, n)

        return score  # type: ignore[no-any-return]

    def _add(self) -> Callable[..., object]:
        """Return statements that add a page's weighted values, and its weights: the units multiply
        these by ones, so that the sums are of the rounded weights."""
        bands, columns = self.bands, self.tiles.head_dim // mma_f16.LOADED_COLUMNS
        multiply, load_values = mma_f16.multiply(bands), self.ring.load_values()
        depth = self.tiles.per_page // DEPTH

        def add_weights(rows: Rows, band: Expr, k: Expr) -> Expr:
            return product(
                mma_f16.MMA,
                lambda i: rows.mass[band, i],
                lambda i: rows.weight[band, k, i],
                lambda i: T.uint32(ONES),
            )

        @T.macro
        def add_values(rows, shared, c, thread):  # type: ignore[no-untyped-def]
            words = T.alloc_buffer((4,), "uint32", scope="local")
            for k in T.unroll(depth):
                for n in T.unroll(columns):
                    load_values(words, shared, c, k, n, thread)
                    multiply(rows.total, rows.weight, words, k, n)
                for band in T.unroll(bands):
                    T.evaluate(add_weights(rows, band, k))

        return add_values  # type: ignore[no-any-return]

    def _hide(self) -> Callable[..., object]:
        """Return statements that hide keys of the page that begins with key `start` from rows that
        must not see them."""
        window, per_page = self.tiles.window, self.tiles.per_page

        def first_key(start: Expr, thread: Expr) -> Expr:
            return start + mma_f16.first_column(thread).astype("int32")

        def seen(last: Expr, key: Expr) -> Expr:
            return key <= last if window is None else T.And(key <= last, key > last - window)

        @T.macro
        def hide(rows, start, thread, band):  # type: ignore[no-untyped-def]
            last = T.alloc_buffer((2,), "int32", scope="local")  # counted from the first column
            for side in T.unroll(2):
                last[side] = rows.last[band, side] - first_key(start, thread)
            for n in T.unroll(per_page // COLUMNS):
                for i in T.unroll(4):
                    rows.score[band, n, i] = T.Select(
                        seen(last[i // 2], n * COLUMNS + i % 2),
                        rows.score[band, n, i],
                        T.float32(HIDDEN),
                    )

        return hide  # type: ignore[no-any-return]

    def _weigh(self) -> Callable[..., object]:
        """Return statements that turn a band's scores of a page into weights."""
        columns, value_columns = self.tiles.per_page // COLUMNS, self.tiles.head_dim // COLUMNS

        @T.macro
        def weigh(rows, band):  # type: ignore[no-untyped-def]
            top = T.alloc_buffer((2,), "float32", scope="local")
            for side in T.unroll(2):
                top[0] = rows.best[band, side]
                for n in T.unroll(columns):
                    for i in T.unroll(2):
                        top[0] = T.max(top[0], rows.score[band, n, side * 2 + i])
                top[0] = T.max(top[0], _of_other(top[0], 1))
                top[0] = T.max(top[0], _of_other(top[0], 2))
                top[1] = _exp2((rows.best[band, side] - top[0]) * T.float32(LOG2_E))
                rows.best[band, side] = top[0]
                top[0] = top[0] * T.float32(LOG2_E)
                for i in T.unroll(2):
                    rows.mass[band, side * 2 + i] *= top[1]
                for n in T.unroll(value_columns):
                    for i in T.unroll(2):
                        rows.total[band, n, side * 2 + i] *= top[1]
                for n in T.unroll(columns):
                    for i in T.unroll(2):
                        rows.score[band, n, side * 2 + i] = _exp2(
                            rows.score[band, n, side * 2 + i] * T.float32(LOG2_E) - top[0]
                        )
            for n in T.unroll(columns):
                for side in T.unroll(2):
                    rows.weight[band, n // 2, n % 2 * 2 + side] = _packed(
                        rows.score[band, n, side * 2], rows.score[band, n, side * 2 + 1]
                    )

        return weigh  # type: ignore[no-any-return]

    def write(self) -> Callable[..., object]:
        """Return statements that write a lane's results."""
        tiles, bands, columns = self.tiles, self.bands, self.tiles.head_dim // COLUMNS
        out, head_dim = tiles.out, tiles.head_dim

        def sink_mass(kv_head: Expr, row: Expr, best: Expr) -> Expr:
            sink = tiles.sinks[tiles.head_of(kv_head, row)]
            return _exp2((sink - best) * T.float32(LOG2_E))

        @T.macro
        def write_row(rows, band, side, kv_head, tile, row, thread):  # type: ignore[no-untyped-def]
            share = T.alloc_buffer((1,), "float32", scope="local")
            at = T.alloc_buffer((2,), "int64", scope="local")  # token and column
            pair = T.alloc_buffer((2,), "float32", scope="local")
            share[0] = sink_mass(kv_head, row, rows.best[band, side])
            share[0] = T.float32(1) / (share[0] + rows.mass[band, side * 2])
            at[0] = tiles.token_of(tile, row)
            at[1] = tiles.head_of(kv_head, row) * head_dim + mma_f16.first_column(thread)
            if tiles.kept(tile, row):
                for n in T.unroll(columns):
                    for i in T.unroll(2):
                        pair[i] = rows.total[band, n, side * 2 + i] * share[0]
                    column = at[1] + n * COLUMNS
                    out[at[0], column : column + 2] = pair.vload([0], "float32x2")

        @T.macro
        def write(rows, kv_head, tile, thread):  # type: ignore[no-untyped-def]
            for band in T.unroll(bands):
                for side in T.unroll(2):
                    write_row(rows, band, side, kv_head, tile, self.row(thread, band, side), thread)

        return write  # type: ignore[no-any-return]


def _of_other(value: Expr, distance: int) -> Expr:
    """Return the value of another lane, of those that share a row."""
    return T.tvm_warp_shuffle_xor(T.uint32(_ALL), value, distance, WARP, WARP)


def _exp2(x: Expr) -> Expr:
    return T.call_extern("float32", mma_f16.EXP2, x)


def _packed(low: Expr, high: Expr) -> Expr:
    return T.call_extern("uint32", mma_f16.PACK, low, high)
