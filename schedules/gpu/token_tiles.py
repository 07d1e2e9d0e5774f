"""Tiles of an attention kernel: some tokens and the query heads of a KV head are the rows of a
tile, which goes through the keys in chunks."""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..formats import const

HIDDEN = -1e30  # score of a key that must not be seen


class TokenTiles:
    """The tiles of an attention kernel: `together` tokens a tile, `chunk` keys a chunk."""

    def __init__(self, function: PrimFunc, together: int, chunk: int) -> None:
        buffers = {parameter.name: parameter for parameter in function.params}
        self.queries, self.keys, self.values, self.sinks = (
            buffers[n] for n in ("queries", "keys", "values", "sinks")
        )
        self.position, self.table, self.out = (buffers[n] for n in ("position", "table", "out"))
        self.together, self.chunk = together, chunk
        self.num_tokens = self.queries.shape[0]
        self.heads, self.head_dim = (int(e) for e in self.queries.shape[1:])
        self.kv_heads, page_tiles, _, self.per_tile = (int(e) for e in self.keys.shape[1:])
        self.per_page = page_tiles * self.per_tile
        self.group = self.heads // self.kv_heads
        self.window = int(function.attrs["window"]) or None

    def count(self) -> Expr:
        return (self.num_tokens + (self.together - 1)) // self.together

    def token_of(self, tile: Expr, row: Expr) -> Expr:
        """Return the token of a row; rows past the last token repeat it, and are not kept."""
        token = T.min(row // self.group, self.together - 1)
        return T.min(tile * self.together + token, self.num_tokens - 1)

    def head_of(self, kv_head: Expr, row: Expr) -> Expr:
        return kv_head * self.group + row % self.group

    def kept(self, tile: Expr, row: Expr) -> Expr:
        exists = tile * self.together + row // self.group < self.num_tokens
        return T.And(row < self.together * self.group, exists)

    def last_key(self, tile: Expr, row: Expr) -> Expr:
        """Return the row's own key, the last one it sees."""
        return self.position[0].astype("int64") + self.token_of(tile, row)

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
        last_row = const(self.together * self.group - 1, "int64")
        return self.last_key(tile, last_row) // self.chunk + 1 - self.first_chunk(tile)

    def key_at(self, kv_head: Expr, key: Expr, d: Expr) -> Expr:
        page, slot = self.place(key)
        number = self.keys[page, kv_head, slot // self.per_tile, d, slot % self.per_tile]
        return number.astype("float32")

    def value_at(self, kv_head: Expr, key: Expr, d: Expr) -> Expr:
        page, slot = self.place(key)
        return self.values[page, kv_head, slot, d].astype("float32")

    def place(self, key: Expr) -> tuple[Expr, Expr]:
        """Return the page of a key, and where the key lies there."""
        return self.table[key // self.per_page].astype("int64"), key % self.per_page
