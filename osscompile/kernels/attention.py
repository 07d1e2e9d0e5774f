"""Attention over the KV cache, with sinks, computed key by key.

The names of loops tell schedules that keep them: iterations of `task` are independent, those of
`lane` are the elements of a vector. Schedules that go through the keys in chunks write their own.
"""

from functools import cache

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.kv_cache import KEYS_PER_TILE
from ..schedules.formats import Index, extent


@cache
def attention(
    tokens: Index,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    window: int | None,
    dtype: str,
) -> PrimFunc:
    """Causal attention of new tokens over the cache, which already holds them.

    queries [tokens, heads, head_dim] float32 (rotated and scaled), keys and values as in
    `kv_cache.append_kv`, sinks [heads] float32, position [1] int32 (of the first token)
    -> [tokens, heads * head_dim] float32.

    The sink is a logit without a value: it starts the running maximum of the online softmax, and
    its mass 1 starts the running sum (Milakov and Gimelshein 2018).
    """
    group = heads // kv_heads
    key_tiles, num_tokens = capacity // KEYS_PER_TILE, extent(tokens)

    def last_key(position: Buffer, task: Expr) -> Expr:
        return position[0].astype("int64") + task // heads

    def first_key(position: Buffer, task: Expr) -> Expr:
        if window is None:
            return T.int64(0)
        return T.max(last_key(position, task) - (window - 1), T.int64(0))

    def key(keys: Buffer, task: Expr, at: Expr, d: Expr) -> Expr:
        slot = at % capacity
        element = keys[task % heads // group, slot // KEYS_PER_TILE, d, slot % KEYS_PER_TILE]
        return element.astype("float32")

    def value(values: Buffer, task: Expr, at: Expr, d: Expr) -> Expr:
        return values[task % heads // group, at % capacity, d].astype("float32")

    @T.prim_func(private=True, s_tir=True)
    def attend(
        queries: T.Buffer((num_tokens, T.int64(heads), T.int64(head_dim)), "float32"),
        keys: T.Buffer(
            (T.int64(kv_heads), T.int64(key_tiles), T.int64(head_dim), T.int64(KEYS_PER_TILE)),
            dtype,
        ),
        values: T.Buffer((T.int64(kv_heads), T.int64(capacity), T.int64(head_dim)), dtype),
        sinks: T.Buffer((T.int64(heads),), "float32"),
        position: T.Buffer((T.int64(1),), "int32"),
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
                        keys, task, first_key(position, task) + k, d
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
                        values, task, first_key(position, task) + k, lane
                    )
            for lane in range(T.int64(head_dim)):
                out[task // heads, task % heads * head_dim + lane] = (
                    out[task // heads, task % heads * head_dim + lane] / mass[0]
                )

    return attend
