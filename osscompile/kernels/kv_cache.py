"""The KV cache: where keys and values lie, and the kernel that adds new ones.

Keys lie in tiles of 16 positions with the position innermost, so that a vector, or neighbouring
threads, hold the same element of 16 keys; values lie position by position. Position p is in slot p
modulo the capacity. A full layer's capacity is the context; a sliding layer is a ring of window +
chunk positions.
"""

from functools import cache

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..runtime.kv_cache import KEYS_PER_TILE
from ..schedules.formats import Index, extent
from .rows import rotated


@cache
def append_kv(
    tokens: Index,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    capacity: int,
    dtype: str,
) -> PrimFunc:
    """Rotate the new keys and write keys and values into the cache, in place.

    keys [kv_heads, capacity/16, head_dim, 16], values [kv_heads, capacity, head_dim] of `dtype`,
    qkv [tokens, (heads + 2 kv_heads) head_dim] float32, rope [context, head_dim/2, 2] float32,
    position [1] int32 (of the first token).
    """
    width = (heads + 2 * kv_heads) * head_dim
    key_start, value_start = heads * head_dim, (heads + kv_heads) * head_dim
    key_tiles, num_tokens = capacity // KEYS_PER_TILE, extent(tokens)

    def position_of(position: Buffer, n: Expr) -> Expr:
        return position[0].astype("int64") + n

    def rotated_key(qkv: Buffer, rope: Buffer, position: Buffer, n: Expr, h: Expr, d: Expr) -> Expr:
        start = key_start + h * head_dim
        return rotated(qkv, rope, n, position_of(position, n), start, d, head_dim).astype(dtype)

    def value(qkv: Buffer, n: Expr, h: Expr, d: Expr) -> Expr:
        return qkv[n, value_start + h * head_dim + d].astype(dtype)

    def slot(position: Buffer, n: Expr) -> Expr:
        return position_of(position, n) % capacity

    @T.prim_func(private=True, s_tir=True)
    def append(
        keys: T.Buffer(
            (T.int64(kv_heads), T.int64(key_tiles), T.int64(head_dim), T.int64(KEYS_PER_TILE)),
            dtype,
        ),
        values: T.Buffer((T.int64(kv_heads), T.int64(capacity), T.int64(head_dim)), dtype),
        qkv: T.Buffer((num_tokens, T.int64(width)), "float32"),
        rope: T.Buffer((T.int64(context), T.int64(head_dim // 2), T.int64(2)), "float32"),
        position: T.Buffer((T.int64(1),), "int32"),
    ) -> None:
        T.func_attr({"op": "append_kv", "tirx.noalias": True})
        for i, h, d in T.grid(num_tokens, T.int64(kv_heads), T.int64(head_dim)):
            with T.sblock("keys"):
                token, head, k = T.axis.remap("SSS", [i, h, d])
                keys[
                    head,
                    slot(position, token) // KEYS_PER_TILE,
                    k,
                    slot(position, token) % KEYS_PER_TILE,
                ] = rotated_key(qkv, rope, position, token, head, k)
        for i, h, d in T.grid(num_tokens, T.int64(kv_heads), T.int64(head_dim)):
            with T.sblock("values"):
                token, head, k = T.axis.remap("SSS", [i, h, d])
                values[head, slot(position, token), k] = value(qkv, token, head, k)

    return append
