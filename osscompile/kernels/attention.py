"""Attention over the KV cache, with sinks, computed key by key.

The names of loops tell schedules that keep them: iterations of `task` are independent, those of
`lane` are the elements of a vector. Schedules that go through the keys in chunks write their own.
"""

from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.kv_cache import KEYS_PER_TILE, PAGE_TOKENS
from ..runtime.step import TILE_ROWS
from ..schedules.formats import FACTS, POSITION, TABLE, Index, extent, is_few
from .kv_cache import TABLE_PAGES, cache_shapes, page_of

TILES = tirx.Var("tiles", "int64")  # of a step's rows


@cache
def attention(
    tokens: Index,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: str,
) -> PrimFunc:
    """Causal attention of new tokens over the cache, which already holds them.

    queries [tokens, heads, head_dim] float32 (rotated and scaled), keys, values, rows and tables as
    in `kv_cache.append_kv`, sinks [heads] float32 -> [tokens, heads * head_dim] float32.

    A kernel for any number of tokens takes tiles [tiles, 2] int32 too: the first row of each, and
    how many rows, 1 to TILE_ROWS, are consecutive positions of one sequence from there on. They
    cover all rows; a schedule may compute a tile's rows together.

    A schedule may read keys of one page beyond that of the last token: it must not use them.

    The sink is a logit without a value: it starts the running maximum of the online softmax, and
    its mass 1 starts the running sum (Milakov and Gimelshein 2018).
    """
    group = heads // kv_heads
    num_tokens = extent(tokens)

    def last_key(rows: Buffer, task: Expr) -> Expr:
        return rows[task // heads, POSITION].astype("int64")

    def first_key(rows: Buffer, task: Expr) -> Expr:
        if window is None:
            return T.int64(0)
        return T.max(last_key(rows, task) - (window - 1), T.int64(0))

    def page(tables: Buffer, rows: Buffer, task: Expr, at: Expr) -> Expr:
        return page_of(tables, rows[task // heads, TABLE].astype("int64"), at)

    def key(keys: Buffer, page: Expr, task: Expr, at: Expr, d: Expr) -> Expr:
        tile, lane = at % PAGE_TOKENS // KEYS_PER_TILE, at % KEYS_PER_TILE
        return keys[page, task % heads // group, tile, d, lane].astype("float32")

    def value(values: Buffer, page: Expr, task: Expr, at: Expr, d: Expr) -> Expr:
        return values[page, task % heads // group, at % PAGE_TOKENS, d].astype("float32")

    keys_shape, values_shape = cache_shapes(kv_heads, head_dim)

    @T.macro
    def attend_all(queries, keys, values, sinks, rows, tables, out):  # type: ignore[no-untyped-def]
        for task in range(num_tokens * heads):
            score = T.alloc_buffer((1,), "float32", scope="local")
            best = T.alloc_buffer((2,), "float32", scope="local")  # after and before this key
            mass = T.alloc_buffer((1,), "float32", scope="local")
            best[0] = sinks[task % heads]
            mass[0] = T.float32(1.0)
            for lane in range(T.int64(head_dim)):
                out[task // heads, task % heads * head_dim + lane] = T.float32(0.0)
            for k in range(last_key(rows, task) + 1 - first_key(rows, task)):
                score[0] = T.float32(0.0)
                for d in range(T.int64(head_dim)):
                    score[0] += queries[task // heads, task % heads, d] * key(
                        keys,
                        page(tables, rows, task, first_key(rows, task) + k),
                        task,
                        first_key(rows, task) + k,
                        d,
                    )
                best[1] = best[0]
                best[0] = T.max(best[0], score[0])
                score[0] = T.exp(score[0] - best[0])
                best[1] = T.exp(best[1] - best[0])
                mass[0] = mass[0] * best[1] + score[0]
                for lane in range(T.int64(head_dim)):
                    out[task // heads, task % heads * head_dim + lane] = out[
                        task // heads, task % heads * head_dim + lane
                    ] * best[1] + score[0] * value(
                        values,
                        page(tables, rows, task, first_key(rows, task) + k),
                        task,
                        first_key(rows, task) + k,
                        lane,
                    )
            for lane in range(T.int64(head_dim)):
                out[task // heads, task % heads * head_dim + lane] = (
                    out[task // heads, task % heads * head_dim + lane] / mass[0]
                )

    if is_few(tokens):

        @T.prim_func(private=True, s_tir=True)
        def attend_few(
            queries: T.Buffer((num_tokens, T.int64(heads), T.int64(head_dim)), "float32"),
            keys: T.Buffer(keys_shape, dtype),
            values: T.Buffer(values_shape, dtype),
            sinks: T.Buffer((T.int64(heads),), "float32"),
            rows: T.Buffer((num_tokens, T.int64(FACTS)), "int32"),
            tables: T.Buffer((TABLE_PAGES,), "int32"),
            out: T.Buffer((num_tokens, T.int64(heads * head_dim)), "float32"),
        ) -> None:
            T.func_attr(
                {
                    "op": "attention",
                    "window": window or 0,
                    "tile_rows": TILE_ROWS,
                    "tirx.noalias": True,
                }
            )
            attend_all(queries, keys, values, sinks, rows, tables, out)

        return attend_few

    @T.prim_func(private=True, s_tir=True)
    def attend_any(
        queries: T.Buffer((num_tokens, T.int64(heads), T.int64(head_dim)), "float32"),
        keys: T.Buffer(keys_shape, dtype),
        values: T.Buffer(values_shape, dtype),
        sinks: T.Buffer((T.int64(heads),), "float32"),
        rows: T.Buffer((num_tokens, T.int64(FACTS)), "int32"),
        tables: T.Buffer((TABLE_PAGES,), "int32"),
        tiles: T.Buffer((TILES, T.int64(2)), "int32"),
        out: T.Buffer((num_tokens, T.int64(heads * head_dim)), "float32"),
    ) -> None:
        T.func_attr(
            {"op": "attention", "window": window or 0, "tile_rows": TILE_ROWS, "tirx.noalias": True}
        )
        attend_all(queries, keys, values, sinks, rows, tables, out)

    return attend_any
