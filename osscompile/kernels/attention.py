"""Attention over the KV cache, with sinks, computed key by key.

The names of loops tell schedules that keep them: iterations of `task` are independent, those of
`lane` are the elements of a vector. Schedules that go through the keys in chunks write their own.
"""

from functools import cache

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.kv_cache import KEYS_PER_TILE, PAGE_TOKENS
from ..schedules.formats import Index, extent
from .kv_cache import TABLE_PAGES, cache_shapes, page_of


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

    queries [tokens, heads, head_dim] float32 (rotated and scaled), keys, values and table as in
    `kv_cache.append_kv`, sinks [heads] float32, position [1] int32 (of the first token)
    -> [tokens, heads * head_dim] float32.

    A schedule may read keys of one page beyond that of the last token: it must not use them.

    The sink is a logit without a value: it starts the running maximum of the online softmax, and
    its mass 1 starts the running sum (Milakov and Gimelshein 2018).
    """
    group = heads // kv_heads
    num_tokens = extent(tokens)

    def last_key(position: Buffer, task: Expr) -> Expr:
        return position[0].astype("int64") + task // heads

    def first_key(position: Buffer, task: Expr) -> Expr:
        if window is None:
            return T.int64(0)
        return T.max(last_key(position, task) - (window - 1), T.int64(0))

    def key(keys: Buffer, table: Buffer, task: Expr, at: Expr, d: Expr) -> Expr:
        tile, lane = at % PAGE_TOKENS // KEYS_PER_TILE, at % KEYS_PER_TILE
        return keys[page_of(table, at), task % heads // group, tile, d, lane].astype("float32")

    def value(values: Buffer, table: Buffer, task: Expr, at: Expr, d: Expr) -> Expr:
        slot = at % PAGE_TOKENS
        return values[page_of(table, at), task % heads // group, slot, d].astype("float32")

    keys_shape, values_shape = cache_shapes(kv_heads, head_dim)

    @T.prim_func(private=True, s_tir=True)
    def attend(
        queries: T.Buffer((num_tokens, T.int64(heads), T.int64(head_dim)), "float32"),
        keys: T.Buffer(keys_shape, dtype),
        values: T.Buffer(values_shape, dtype),
        sinks: T.Buffer((T.int64(heads),), "float32"),
        position: T.Buffer((T.int64(1),), "int32"),
        table: T.Buffer((TABLE_PAGES,), "int32"),
        out: T.Buffer((num_tokens, T.int64(heads * head_dim)), "float32"),
    ) -> None:
        T.func_attr({"op": "attention", "window": window or 0, "tirx.noalias": True})
        for task in range(num_tokens * heads):
            score = T.alloc_buffer((1,), "float32", scope="local")
            best = T.alloc_buffer((2,), "float32", scope="local")  # after and before this key
            mass = T.alloc_buffer((1,), "float32", scope="local")
            best[0] = sinks[task % heads]
            mass[0] = T.float32(1.0)
            for lane in range(T.int64(head_dim)):
                out[task // heads, task % heads * head_dim + lane] = T.float32(0.0)
            for k in range(last_key(position, task) + 1 - first_key(position, task)):
                score[0] = T.float32(0.0)
                for d in range(T.int64(head_dim)):
                    score[0] += queries[task // heads, task % heads, d] * key(
                        keys, table, task, first_key(position, task) + k, d
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
                        values, table, task, first_key(position, task) + k, lane
                    )
            for lane in range(T.int64(head_dim)):
                out[task // heads, task % heads * head_dim + lane] = (
                    out[task // heads, task % heads * head_dim + lane] / mass[0]
                )

    return attend
