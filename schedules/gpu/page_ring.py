"""Pages of the KV cache in shared memory: a ring of stages, into which copies run ahead.

A stage holds a page of a KV head's keys and one of its values, float16, in pieces of 16 bytes as
they lie in the cache: eight keys of one element, or eight elements of a value. Pieces change places
so that those of eight neighbouring rows lie in different banks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from . import mma_f16, wgmma
from .token_tiles import TokenTiles
from .wgmma import PIECE

PIECE_NUMBERS = 8  # float16
ROW_NUMBERS = 64  # that reach every bank


@dataclass(frozen=True)
class PageRing:
    """Stages that `threads` copy pages into."""

    tiles: TokenTiles
    stages: int
    threads: int

    @property
    def pieces(self) -> int:
        """Of a page of keys, and as many of values."""
        return self.tiles.per_page * self.tiles.head_dim // PIECE_NUMBERS

    @property
    def stage_words(self) -> int:
        return 2 * self.pieces * PIECE

    def copy(self) -> Callable[..., object]:
        """Return statements that start the copies of a page into the stage of page c of a tile."""
        threads, pieces, tiles = self.threads, self.pieces, self.tiles
        columns, each = tiles.head_dim // PIECE_NUMBERS, tiles.per_tile // PIECE_NUMBERS

        def key(page: Expr, kv_head: Expr, number: Expr) -> Expr:
            d, half = number // each % tiles.head_dim, number % each
            tile = number // (each * tiles.head_dim)
            return tiles.keys[page, kv_head, tile, d, half * PIECE_NUMBERS]

        def value(page: Expr, kv_head: Expr, number: Expr) -> Expr:
            return tiles.values[page, kv_head, number // columns, number % columns * PIECE_NUMBERS]

        def copied(to: Expr, source: Expr) -> Expr:
            return T.call_extern("void", wgmma.COPY, T.address_of(to), T.address_of(source))

        @T.macro
        def copy(shared, page, kv_head, c, thread):  # type: ignore[no-untyped-def]
            for i in T.unroll(-(-pieces // threads)):
                if i * threads + thread < pieces:
                    T.evaluate(
                        copied(
                            shared[self._key_word(c, i * threads + thread)],
                            key(page, kv_head, i * threads + thread),
                        )
                    )
                    T.evaluate(
                        copied(
                            shared[self._value_word(c, i * threads + thread)],
                            value(page, kv_head, i * threads + thread),
                        )
                    )

        return copy  # type: ignore[no-any-return]

    def load_keys(self) -> Callable[..., object]:
        """Return statements that load the words of 16 elements, the k-th, of 16 keys, the n-th."""
        head_dim = self.tiles.head_dim

        @T.macro
        def load_keys(words, shared, c, k, n, thread):  # type: ignore[no-untyped-def]
            T.evaluate(self._load(words, shared, self._keys_at(c, n * head_dim + k * 16, thread)))

        return load_keys  # type: ignore[no-any-return]

    def load_values(self) -> Callable[..., object]:
        """Return the same of 16 values, the k-th, and 16 of their elements, the n-th."""

        @T.macro
        def load_values(words, shared, c, k, n, thread):  # type: ignore[no-untyped-def]
            T.evaluate(self._load(words, shared, self._values_at(c, k * 16, n * 2, thread)))

        return load_values  # type: ignore[no-any-return]

    def _stage(self, c: Expr) -> Expr:
        return c % self.stages * self.stage_words

    def _key_word(self, c: Expr, number: Expr) -> Expr:
        """Return where a piece of the keys lies; a row has two."""
        return self._stage(c) + T.bitwise_xor(number, number // 8 % 2) * PIECE

    def _value_word(self, c: Expr, number: Expr) -> Expr:
        """Return where a piece of the values lies; a row has 8, or a multiple."""
        columns = self.tiles.head_dim // PIECE_NUMBERS
        place = T.bitwise_xor(number, number // columns % 8)
        return self._stage(c) + (self.pieces + place) * PIECE

    def _load(self, words: Buffer, shared: Buffer, word: Expr) -> Expr:
        return T.call_extern("void", mma_f16.LOAD, T.address_of(words[0]), shared.data, word)

    def _keys_at(self, c: Expr, row: Expr, thread: Expr) -> Expr:
        """Return where a lane's piece of 16 rows of keys lies."""
        r, half = mma_f16.loaded_row(thread)
        piece = r * 2 + T.bitwise_xor(half, r // 4 % 2)
        return self._stage(c) + row * (2 * PIECE) + piece * PIECE

    def _values_at(self, c: Expr, row: Expr, column: Expr, thread: Expr) -> Expr:
        r, half = mma_f16.loaded_row(thread)
        columns = self.tiles.head_dim // PIECE_NUMBERS
        piece = r * columns + T.bitwise_xor(column + half, r % 8)
        return self._stage(c) + (self.pieces + row * columns + piece) * PIECE
