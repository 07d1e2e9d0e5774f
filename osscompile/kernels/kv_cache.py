"""The KV cache: where keys and values lie, and the kernel that adds new ones.

They lie in pages of `PAGE_TOKENS` positions: a sequence's table says in which page it has its first
positions, in which the next ones, and so on. The tables of all sequences lie in one array, and a
row says where that of its sequence begins. Within a page keys lie in tiles of 16 positions with
the position innermost, so that a vector, or neighbouring threads, hold the same element of 16 keys;
values lie position by position.
"""

from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.kv_cache import KEYS_PER_TILE, PAGE_TOKENS
from ..schedules.formats import FACTS, POSITION, TABLE, Index, extent
from .rows import rotated

PAGES = tirx.Var("pages", "int64")  # of an array of keys or values, fixed when a model is loaded
TABLE_PAGES = tirx.Var("table_pages", "int64")  # of all sequences


def page_shapes(kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a page of keys and of a page of values."""
    keys = (kv_heads, PAGE_TOKENS // KEYS_PER_TILE, head_dim, KEYS_PER_TILE)
    return keys, (kv_heads, PAGE_TOKENS, head_dim)


def cache_shapes(kv_heads: int, head_dim: int) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """Shapes of the keys and of the values of a layer, as kernels see them."""
    keys, values = page_shapes(kv_heads, head_dim)
    return (PAGES, *map(extent, keys)), (PAGES, *map(extent, values))


def page_of(tables: Buffer, first: Expr, position: Expr) -> Expr:
    """The page that holds a position of the sequence whose table begins at `first`."""
    return tables[first + position // PAGE_TOKENS].astype("int64")


@cache
def append_kv(
    tokens: Index, heads: int, kv_heads: int, head_dim: int, context: int, dtype: str
) -> PrimFunc:
    """Rotate the new keys and write keys and values into the cache, in place.

    keys [pages, kv_heads, PAGE_TOKENS/16, head_dim, 16] and values [pages, kv_heads, PAGE_TOKENS,
    head_dim] of `dtype`, qkv [tokens, (heads + 2 kv_heads) head_dim] float32, rope [context,
    head_dim/2, 2] float32, rows [tokens, 3] int32, tables [table_pages] int32 (the page of every
    PAGE_TOKENS positions of a sequence). Rows that are the same position of a sequence must have
    the same keys and values.
    """
    width = (heads + 2 * kv_heads) * head_dim
    key_start, value_start = heads * head_dim, (heads + kv_heads) * head_dim
    num_tokens = extent(tokens)

    def position_of(rows: Buffer, n: Expr) -> Expr:
        return rows[n, POSITION].astype("int64")

    def rotated_key(qkv: Buffer, rope: Buffer, rows: Buffer, n: Expr, h: Expr, d: Expr) -> Expr:
        start = key_start + h * head_dim
        return rotated(qkv, rope, n, position_of(rows, n), start, d, head_dim).astype(dtype)

    def value(qkv: Buffer, n: Expr, h: Expr, d: Expr) -> Expr:
        return qkv[n, value_start + h * head_dim + d].astype(dtype)

    def page(tables: Buffer, rows: Buffer, n: Expr) -> Expr:
        return page_of(tables, rows[n, TABLE].astype("int64"), position_of(rows, n))

    def slot(rows: Buffer, n: Expr) -> Expr:
        """Within the page."""
        return position_of(rows, n) % PAGE_TOKENS

    keys_shape, values_shape = cache_shapes(kv_heads, head_dim)

    @T.prim_func(private=True, s_tir=True)
    def append(
        keys: T.Buffer(keys_shape, dtype),
        values: T.Buffer(values_shape, dtype),
        qkv: T.Buffer((num_tokens, T.int64(width)), "float32"),
        rope: T.Buffer((T.int64(context), T.int64(head_dim // 2), T.int64(2)), "float32"),
        rows: T.Buffer((num_tokens, T.int64(FACTS)), "int32"),
        tables: T.Buffer((TABLE_PAGES,), "int32"),
    ) -> None:
        T.func_attr({"op": "append_kv", "tirx.noalias": True})
        for i, h, d in T.grid(num_tokens, T.int64(kv_heads), T.int64(head_dim)):
            with T.sblock("keys"):
                token, head, k = T.axis.remap("SSS", [i, h, d])
                keys[
                    page(tables, rows, token),
                    head,
                    slot(rows, token) // KEYS_PER_TILE,
                    k,
                    slot(rows, token) % KEYS_PER_TILE,
                ] = rotated_key(qkv, rope, rows, token, head, k)
        for i, h, d in T.grid(num_tokens, T.int64(kv_heads), T.int64(head_dim)):
            with T.sblock("values"):
                token, head, k = T.axis.remap("SSS", [i, h, d])
                values[page(tables, rows, token), head, slot(rows, token), k] = value(
                    qkv, token, head, k
                )

    return append
