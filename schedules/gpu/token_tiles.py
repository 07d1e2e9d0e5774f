"""Tiles of an attention kernel: some tokens and the query heads of a KV head are the rows of a
tile, which goes through the keys in chunks."""

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..formats import POSITION, TABLE, const

HIDDEN = -1e30  # score of a key that must not be seen


class TokenTiles:
    """The tiles of an attention kernel: at most `together` consecutive tokens of a sequence a tile,
    `chunk` keys a chunk. A kernel for few tokens has one a tile."""

    def __init__(self, function: PrimFunc, together: int, chunk: int) -> None:
        buffers = {parameter.name: parameter for parameter in function.params}
        self.keys, self.values, self.sinks, self.rows, self.tables = (
            buffers[n] for n in ("keys", "values", "sinks", "rows", "tables")
        )
        self.queries: Any = buffers.get("queries")  # of a kernel that rotates them there are none,
        self.out: Any = buffers.get("out")  # and of one that quantises it
        self.tiles = buffers.get("tiles")  # whose rows several of these tiles share
        self.together, self.chunk = 1 if self.tiles is None else together, chunk
        self.parts = int(function.attrs["tile_rows"]) // self.together
        self.num_tokens, self.heads = self.rows.shape[0], int(self.sinks.shape[0])
        self.kv_heads, page_tiles, self.head_dim, self.per_tile = map(int, self.keys.shape[1:])
        self.per_page = page_tiles * self.per_tile
        self.group = self.heads // self.kv_heads
        self.window = int(function.attrs["window"]) or None

    def count(self) -> Expr:
        return self.num_tokens if self.tiles is None else self.tiles.shape[0] * self.parts

    def latest(self, number: Expr) -> Expr:
        """Return the tiles of later rows first: of a long prompt they see most keys, and the launch
        ends sooner if the shortest work begins last."""
        assert self.tiles is not None
        # TVM divides a difference wrongly if its second number has a part of the tile
        shared = self.tiles.shape[0] - 1 - number // self.parts
        return shared * self.parts + number % self.parts

    def token_of(self, tile: Expr, row: Expr) -> Expr:
        """Return the token of a row; rows past the last token repeat it, and are not kept."""
        if self.tiles is None:
            return tile
        token = tile % self.parts * self.together + T.min(row // self.group, self.together - 1)
        return self._shared(tile, 0) + T.min(token, self._shared(tile, 1) - 1)

    def head_of(self, kv_head: Expr, row: Expr) -> Expr:
        return kv_head * self.group + row % self.group

    def kept(self, tile: Expr, row: Expr) -> Expr:
        """Whether a row is one of the tile's tokens and heads."""
        within = row < self.together * self.group
        if self.tiles is None:
            return within
        token = tile % self.parts * self.together + row // self.group
        return T.And(within, token < self._shared(tile, 1))

    def last_key(self, tile: Expr, row: Expr) -> Expr:
        """Return the row's own key, the last one it sees."""
        return self._fact(tile, row, POSITION)

    def visible(self, tile: Expr, row: Expr, key: Expr) -> Expr:
        key, last = key.astype("int32"), self.last_key(tile, row).astype("int32")
        if self.window is None:
            return key <= last
        return T.And(key <= last, key > last - self.window)

    def first_chunk(self, tile: Expr) -> Expr:
        """Return the first chunk that any row of the tile sees."""
        zero = const(0, "int64")
        if self.window is None:
            return zero
        return T.max(self.last_key(tile, zero) - (self.window - 1), zero) // self.chunk

    def num_chunks(self, tile: Expr) -> Expr:
        """Return how many chunks the tile sees; none if it has no token."""
        zero, last_row = (const(r, "int64") for r in (0, self.together * self.group - 1))
        count = self.last_key(tile, last_row) // self.chunk + 1 - self.first_chunk(tile)
        return T.Select(self.kept(tile, zero), count, zero)

    def query_at(self, token: Expr, head: Expr, d: Expr) -> Expr:
        return self.queries[token, head, d]

    def key_at(self, tile: Expr, kv_head: Expr, key: Expr, d: Expr) -> Expr:
        page, slot = self.place(tile, key)
        number = self.keys[page, kv_head, slot // self.per_tile, d, slot % self.per_tile]
        return number.astype("float32")

    def value_at(self, tile: Expr, kv_head: Expr, key: Expr, d: Expr) -> Expr:
        page, slot = self.place(tile, key)
        return self.values[page, kv_head, slot, d].astype("float32")

    def keep(self) -> Callable[..., object]:
        """Return a macro (value, token, head, d, ...) that writes an element of the result."""
        out, head_dim = self.out, self.head_dim

        @T.macro
        def keep(value, token, head, d, kept, largest, scales, whole):  # type: ignore[no-untyped-def]
            out[token, head * head_dim + d] = value

        return keep  # type: ignore[no-any-return]

    def place(self, tile: Expr, key: Expr) -> tuple[Expr, Expr]:
        """Return the page of a key of the tile's sequence, and where the key lies there."""
        page = self.tables[self.table(tile) + key // self.per_page]
        return page.astype("int64"), key % self.per_page

    def table(self, tile: Expr) -> Expr:
        """Return where the table of the tile's sequence begins."""
        return self._fact(tile, const(0, "int64"), TABLE)

    def _fact(self, tile: Expr, row: Expr, column: int) -> Expr:
        return self.rows[self.token_of(tile, row), column].astype("int64")

    def _shared(self, tile: Expr, column: int) -> Expr:
        """Return the first row, or the number of rows, of what several tiles share."""
        assert self.tiles is not None
        return self.tiles[tile // self.parts, column].astype("int64")
