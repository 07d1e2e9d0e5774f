"""The KV cache and attention over it, with sinks; a sliding layer's cache is a ring.

Keys lie in tiles of 8 positions with the position innermost, so that a vector holds the same
element of 8 keys; values lie position by position. Position p is in slot p modulo the capacity: in
a full layer the capacity is the context, in a sliding layer window + chunk.

These kernels are plain loops whose names say what a schedule may do with them: the iterations of
`task` are independent, those of `lane` are the elements of a vector, those of `row` are few and
keep their accumulators in registers when unrolled.
"""

from functools import cache

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..schedules.formats import Index, const, extent
from .rows import rotated

KEYS_PER_TILE = 8
DIMS_PER_PART = 8  # of the values: as many accumulators as query heads stay in registers
HIDDEN = -1e30  # score of a key that must not be seen


@cache
def append_kv(
    tiles: Index,
    tile: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    capacity: int,
    dtype: str,
) -> PrimFunc:
    """Rotate the new keys and write keys and values into the cache, in place.

    keys [kv_heads, capacity/8, head_dim, 8], values [kv_heads, capacity, head_dim] of `dtype`,
    qkv [tiles, tile, (heads + 2 kv_heads) head_dim] float32, rope [context, head_dim/2, 2] float32,
    position [1] int32: that of the first token.
    """
    width = (heads + 2 * kv_heads) * head_dim
    key_start, value_start = heads * head_dim, (heads + kv_heads) * head_dim
    key_tiles, n_tiles = capacity // KEYS_PER_TILE, extent(tiles)

    def position_of(position: Buffer, n: Expr) -> Expr:
        return position[0].astype("int64") + n

    def rotated_key(qkv: Buffer, rope: Buffer, position: Buffer, n: Expr, h: Expr, d: Expr) -> Expr:
        start = key_start + h * head_dim
        row = (n // tile, n % tile)
        return rotated(qkv, rope, row, position_of(position, n), start, d, head_dim).astype(dtype)

    def value(qkv: Buffer, n: Expr, h: Expr, d: Expr) -> Expr:
        return qkv[n // tile, n % tile, value_start + h * head_dim + d].astype(dtype)

    def slot(position: Buffer, n: Expr) -> Expr:
        return position_of(position, n) % capacity

    @T.prim_func(private=True, s_tir=True)
    def append(
        keys: T.Buffer(
            (T.int64(kv_heads), T.int64(key_tiles), T.int64(head_dim), T.int64(8)), dtype
        ),
        values: T.Buffer((T.int64(kv_heads), T.int64(capacity), T.int64(head_dim)), dtype),
        qkv: T.Buffer((n_tiles, T.int64(tile), T.int64(width)), "float32"),
        rope: T.Buffer((T.int64(context), T.int64(head_dim // 2), T.int64(2)), "float32"),
        position: T.Buffer((T.int64(1),), "int32"),
    ) -> None:
        T.func_attr({"op": "append_kv", "tirx.noalias": True})
        for task in range(n_tiles * tile):
            for h in range(T.int64(kv_heads)):
                for d in range(T.int64(head_dim)):
                    keys[h, slot(position, task) // 8, d, slot(position, task) % 8] = rotated_key(
                        qkv, rope, position, task, h, d
                    )
                for lane in range(T.int64(head_dim)):
                    values[h, slot(position, task), lane] = value(qkv, task, h, lane)

    return append


@cache
def attention(
    tiles: Index,
    tile: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    window: int | None,
    dtype: str,
) -> PrimFunc:
    """Causal attention of new tokens over the cache, which already holds them.

    queries [tiles, tile, heads, head_dim] float32 (rotated and scaled), keys and values as in
    `append_kv`, sinks [heads] float32, position [1] int32: that of the first token
    -> [tiles, tile, heads * head_dim] float32.

    Online softmax over tiles of 8 keys, the query heads of one KV head together. The sink is a
    logit without a value: it starts the running maximum, and its mass 1 starts the running sum.
    """
    group = heads // kv_heads
    key_tiles, n_tiles = capacity // KEYS_PER_TILE, extent(tiles)

    def token(task: Expr) -> Expr:
        return task // kv_heads

    def kv_head(task: Expr) -> Expr:
        return task % kv_heads

    def head(task: Expr, row: Expr) -> Expr:
        return kv_head(task) * group + row

    def column(task: Expr, row: Expr, dim: Expr) -> Expr:
        return head(task, row) * head_dim + dim

    def last_key(position: Buffer, task: Expr) -> Expr:
        return position[0].astype("int64") + token(task)

    def first_key(position: Buffer, task: Expr) -> Expr:
        if window is None:
            return T.int64(0)
        return T.max(last_key(position, task) - (window - 1), T.int64(0))

    def first_tile(position: Buffer, task: Expr) -> Expr:
        return first_key(position, task) // KEYS_PER_TILE

    def tile_count(position: Buffer, task: Expr) -> Expr:
        return last_key(position, task) // KEYS_PER_TILE + 1 - first_tile(position, task)

    def slot_tile(position: Buffer, task: Expr, step: Expr) -> Expr:
        key_tile = first_tile(position, task) + step
        # a full layer never wraps: its slot is its position
        return key_tile if window is None else key_tile % key_tiles

    def visible(position: Buffer, task: Expr, step: Expr, lane: Expr) -> Expr:
        key = (first_tile(position, task) + step) * KEYS_PER_TILE + lane
        return T.And(key <= last_key(position, task), key >= first_key(position, task))

    def float32(x: Expr) -> Expr:
        return x if dtype == "float32" else x.astype("float32")

    def hide(is_visible: Expr, x: Expr, hidden: float) -> Expr:
        return T.Select(is_visible, x, const(hidden, "float32"))

    @T.prim_func(private=True, s_tir=True)
    def attend(
        queries: T.Buffer((n_tiles, T.int64(tile), T.int64(heads), T.int64(head_dim)), "float32"),
        keys: T.Buffer(
            (T.int64(kv_heads), T.int64(key_tiles), T.int64(head_dim), T.int64(8)), dtype
        ),
        values: T.Buffer((T.int64(kv_heads), T.int64(capacity), T.int64(head_dim)), dtype),
        sinks: T.Buffer((T.int64(heads),), "float32"),
        position: T.Buffer((T.int64(1),), "int32"),
        out: T.Buffer((n_tiles, T.int64(tile), T.int64(heads * head_dim)), "float32"),
    ) -> None:
        T.func_attr({"op": "attention", "tirx.noalias": True})
        for task in range(n_tiles * (tile * kv_heads)):
            largest = T.alloc_buffer((group,), "float32", scope="local")
            shrink = T.alloc_buffer((group,), "float32", scope="local")
            total = T.alloc_buffer((group,), "float32", scope="local")
            weight = T.alloc_buffer((group, KEYS_PER_TILE), "float32", scope="local")
            for row in range(group):
                largest[row] = sinks[head(task, row)]
                total[row] = T.float32(1.0)
            for row in range(group):
                for lane in range(head_dim):
                    out[token(task) // tile, token(task) % tile, column(task, row, lane)] = (
                        T.float32(0.0)
                    )
            for step in range(tile_count(position, task)):
                for row in range(group):
                    for lane in range(KEYS_PER_TILE):
                        weight[row, lane] = T.float32(0.0)
                for d in range(head_dim):
                    for row in range(group):
                        for lane in range(KEYS_PER_TILE):
                            weight[row, lane] += queries[
                                token(task) // tile, token(task) % tile, head(task, row), d
                            ] * float32(
                                keys[kv_head(task), slot_tile(position, task, step), d, lane]
                            )
                for row in range(group):
                    for lane in range(KEYS_PER_TILE):
                        weight[row, lane] = hide(
                            visible(position, task, step, lane), weight[row, lane], HIDDEN
                        )
                    shrink[row] = largest[row]
                    for key in range(KEYS_PER_TILE):
                        largest[row] = T.max(largest[row], weight[row, key])
                    shrink[row] = T.exp(shrink[row] - largest[row])
                    total[row] = total[row] * shrink[row]
                    for lane in range(KEYS_PER_TILE):
                        weight[row, lane] = hide(
                            visible(position, task, step, lane),
                            T.exp(weight[row, lane] - largest[row]),
                            0.0,
                        )
                    for key in range(KEYS_PER_TILE):
                        total[row] += weight[row, key]
                    for lane in range(head_dim):
                        out[token(task) // tile, token(task) % tile, column(task, row, lane)] = (
                            out[token(task) // tile, token(task) % tile, column(task, row, lane)]
                            * shrink[row]
                        )
                for part in range(head_dim // DIMS_PER_PART):
                    for key in range(KEYS_PER_TILE):
                        for row in range(group):
                            for lane in range(DIMS_PER_PART):
                                out[
                                    token(task) // tile,
                                    token(task) % tile,
                                    column(task, row, part * DIMS_PER_PART + lane),
                                ] += weight[row, key] * float32(
                                    values[
                                        kv_head(task),
                                        slot_tile(position, task, step) * KEYS_PER_TILE + key,
                                        part * DIMS_PER_PART + lane,
                                    ]
                                )
            for row in range(group):
                for lane in range(head_dim):
                    out[token(task) // tile, token(task) % tile, column(task, row, lane)] = (
                        out[token(task) // tile, token(task) % tile, column(task, row, lane)]
                        / total[row]
                    )

    return attend
