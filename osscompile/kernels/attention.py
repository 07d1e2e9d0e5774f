"""Attention over the KV cache, with sinks.

These kernels are plain loops whose names say what a schedule may do with them: the iterations of
`task` are independent, those of `lane` are the elements of a vector, those of `row` are few and
keep their accumulators in registers when unrolled.
"""

from collections.abc import Callable
from functools import cache

from tvm import DataType
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ..schedules.formats import Index, const, extent, fetch
from .kv_cache import KEYS_PER_TILE

TILES_PER_CHUNK = 8  # of keys, between two corrections of the softmax; their weights fit in 2 kB
VECTORS = 2  # of 8 keys, or of 8 elements of a value, side by side in registers
HEADS_TOGETHER = 4  # query heads x VECTORS sums fill half of the registers
TOKENS_PER_TASK = 8  # of a prefill: they share the chunks of keys in the first-level cache
PARTS = 8  # of the context of one token: enough tasks for many cores
LINE_BYTES = 64  # of the first-level cache
HIDDEN = -1e30  # score of a key that must not be seen


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
    `kv_cache.append_kv`, sinks [heads] float32, position [1] int32: that of the first token
    -> [tokens, heads * head_dim] float32.

    Online softmax over chunks of keys, the query heads of one KV head together. The sink is a
    logit without a value: it starts the running maximum, and its mass 1 starts the running sum.
    A task is some tokens and one KV head; of a single token that sees the whole context, a part of
    the context and one KV head, and the parts are merged at the end.
    """
    if isinstance(tokens, int) and tokens == 1 and window is None:
        return _attention_in_parts(heads, kv_heads, head_dim, capacity, dtype)
    return _attention_of_tokens(tokens, heads, kv_heads, head_dim, capacity, window, dtype)


def _attention_of_tokens(
    tokens: Index,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    window: int | None,
    dtype: str,
) -> PrimFunc:
    group = heads // kv_heads
    key_tiles, num_tokens = capacity // KEYS_PER_TILE, extent(tokens)
    per_task = min(tokens, TOKENS_PER_TASK) if isinstance(tokens, int) else TOKENS_PER_TASK
    attend = _attend_chunk(group, head_dim, key_tiles, window, dtype)

    def column(task: Expr, head: Expr, d: Expr) -> Expr:
        return (task % kv_heads * group + head) * head_dim + d

    def first_token(task: Expr) -> Expr:
        return task // kv_heads * per_task

    def tokens_of(task: Expr) -> Expr:
        return T.min(T.int64(per_task), num_tokens - first_token(task))

    def position_of(position: Buffer, token: Expr) -> Expr:
        return position[0].astype("int64") + token

    def first_tile(position: Buffer, token: Expr) -> Expr:
        if window is None:
            return T.int64(0)
        return T.max(position_of(position, token) - (window - 1), T.int64(0)) // KEYS_PER_TILE

    def num_chunks(position: Buffer, task: Expr) -> Expr:
        last = position_of(position, first_token(task) + tokens_of(task) - 1)
        span = last // KEYS_PER_TILE + 1 - first_tile(position, first_token(task))
        return (span + (TILES_PER_CHUNK - 1)) // TILES_PER_CHUNK

    @T.prim_func(private=True, s_tir=True)
    def attend_tokens(
        queries: T.Buffer((num_tokens, T.int64(heads), T.int64(head_dim)), "float32"),
        keys: T.Buffer(
            (T.int64(kv_heads), T.int64(key_tiles), T.int64(head_dim), T.int64(8)), dtype
        ),
        values: T.Buffer((T.int64(kv_heads), T.int64(capacity), T.int64(head_dim)), dtype),
        sinks: T.Buffer((T.int64(heads),), "float32"),
        position: T.Buffer((T.int64(1),), "int32"),
        out: T.Buffer((num_tokens, T.int64(heads * head_dim)), "float32"),
    ) -> None:
        T.func_attr({"op": "attention", "tirx.noalias": True})
        for task in range((num_tokens + (per_task - 1)) // per_task * kv_heads):
            largest = T.alloc_buffer((per_task, group), "float32", scope="local")
            total = T.alloc_buffer((per_task, group), "float32", scope="local")
            weight = T.alloc_buffer((group, TILES_PER_CHUNK * KEYS_PER_TILE), "float32")
            for t in range(tokens_of(task)):
                for head in range(T.int64(group)):
                    largest[t, head] = sinks[task % kv_heads * group + head]
                    total[t, head] = T.float32(1.0)
                    for lane in range(T.int64(head_dim)):
                        out[first_token(task) + t, column(task, head, lane)] = T.float32(0.0)
            for chunk in range(num_chunks(position, task)):
                for t in range(tokens_of(task)):
                    attend(
                        queries,
                        keys,
                        values,
                        out,
                        largest,
                        total,
                        weight,
                        task % kv_heads,
                        first_token(task) + t,
                        first_token(task) + t,
                        t,
                        first_tile(position, first_token(task)) + chunk * TILES_PER_CHUNK,
                        position_of(position, first_token(task) + t) // KEYS_PER_TILE + 1,
                        position_of(position, first_token(task) + t),
                    )
            for t in range(tokens_of(task)):
                for head in range(T.int64(group)):
                    for lane in range(T.int64(head_dim)):
                        out[first_token(task) + t, column(task, head, lane)] = (
                            out[first_token(task) + t, column(task, head, lane)] / total[t, head]
                        )

    return attend_tokens


def _attention_in_parts(
    heads: int, kv_heads: int, head_dim: int, capacity: int, dtype: str
) -> PrimFunc:
    group = heads // kv_heads
    key_tiles = capacity // KEYS_PER_TILE
    attend = _attend_chunk(group, head_dim, key_tiles, None, dtype, fetches_ahead=True)

    def last_key(position: Buffer) -> Expr:
        return position[0].astype("int64")

    def num_tiles(position: Buffer) -> Expr:
        return last_key(position) // KEYS_PER_TILE + 1

    def first_tile(position: Buffer, part: Expr) -> Expr:
        """Parts differ by one chunk at most; a short context leaves some of them empty."""
        chunks = (num_tiles(position) + (TILES_PER_CHUNK - 1)) // TILES_PER_CHUNK
        return T.min(chunks * part // PARTS * TILES_PER_CHUNK, num_tiles(position))

    def num_chunks(position: Buffer, part: Expr) -> Expr:
        span = first_tile(position, part + 1) - first_tile(position, part)
        return (span + (TILES_PER_CHUNK - 1)) // TILES_PER_CHUNK

    @T.prim_func(private=True, s_tir=True)
    def attend_parts(
        queries: T.Buffer((T.int64(1), T.int64(heads), T.int64(head_dim)), "float32"),
        keys: T.Buffer(
            (T.int64(kv_heads), T.int64(key_tiles), T.int64(head_dim), T.int64(8)), dtype
        ),
        values: T.Buffer((T.int64(kv_heads), T.int64(capacity), T.int64(head_dim)), dtype),
        sinks: T.Buffer((T.int64(heads),), "float32"),
        position: T.Buffer((T.int64(1),), "int32"),
        out: T.Buffer((T.int64(1), T.int64(heads * head_dim)), "float32"),
    ) -> None:
        T.func_attr({"op": "attention", "tirx.noalias": True})
        partial = T.alloc_buffer((PARTS, heads * head_dim), "float32")
        largest = T.alloc_buffer((PARTS * kv_heads, group), "float32")
        total = T.alloc_buffer((PARTS * kv_heads, group), "float32")
        for task in range(T.int64(PARTS * kv_heads)):
            weight = T.alloc_buffer((group, TILES_PER_CHUNK * KEYS_PER_TILE), "float32")
            for head in range(T.int64(group)):
                largest[task, head] = T.float32(HIDDEN)
                total[task, head] = T.float32(0.0)
                if num_chunks(position, task // kv_heads) > 0:
                    for lane in range(T.int64(head_dim)):
                        partial[
                            task // kv_heads, (task % kv_heads * group + head) * head_dim + lane
                        ] = T.float32(0.0)
            for chunk in range(num_chunks(position, task // kv_heads)):
                attend(
                    queries,
                    keys,
                    values,
                    partial,
                    largest,
                    total,
                    weight,
                    task % kv_heads,
                    T.int64(0),
                    task // kv_heads,
                    task,
                    first_tile(position, task // kv_heads) + chunk * TILES_PER_CHUNK,
                    first_tile(position, task // kv_heads + 1),
                    last_key(position),
                )
        for task in range(T.int64(heads)):
            best = T.alloc_buffer((1,), "float32", scope="local")
            mass = T.alloc_buffer((1,), "float32", scope="local")
            share = T.alloc_buffer((1,), "float32", scope="local")
            best[0] = sinks[task]
            for part in range(T.int64(PARTS)):
                best[0] = T.max(best[0], largest[part * kv_heads + task // group, task % group])
            mass[0] = T.exp(sinks[task] - best[0])
            for lane in range(T.int64(head_dim)):
                out[0, task * head_dim + lane] = T.float32(0.0)
            for part in range(T.int64(PARTS)):
                if total[part * kv_heads + task // group, task % group] > T.float32(0.0):
                    share[0] = T.exp(
                        largest[part * kv_heads + task // group, task % group] - best[0]
                    )
                    mass[0] += total[part * kv_heads + task // group, task % group] * share[0]
                    for lane in range(T.int64(head_dim)):
                        out[0, task * head_dim + lane] += (
                            partial[part, task * head_dim + lane] * share[0]
                        )
            for lane in range(T.int64(head_dim)):
                out[0, task * head_dim + lane] = out[0, task * head_dim + lane] / mass[0]

    return attend_parts


def _attend_chunk(
    group: int,
    head_dim: int,
    key_tiles: int,
    window: int | None,
    dtype: str,
    fetches_ahead: bool = False,
) -> Callable[..., object]:
    """Statements that extend the online softmax of one token by one chunk of keys.

    `fetches_ahead`: while a chunk's keys are multiplied, fetch its values and the next chunk's
    keys: they come from memory, and the hardware's own prefetch stops at pages.
    """
    together = max(n for n in range(1, HEADS_TOGETHER + 1) if group % n == 0)
    parts = group // together
    pairs = TILES_PER_CHUNK // VECTORS
    # tiles to fetch for each pair of each part; all of a chunk, evenly
    fetched = -(-TILES_PER_CHUNK // (parts * pairs)) if fetches_ahead else 0
    line = LINE_BYTES // DataType(dtype).itemsize

    def column(kv_head: Expr, part: Expr, row: Expr, dims: Expr) -> Expr:
        head = kv_head * group + part * together + row // VECTORS
        return head * head_dim + (dims * VECTORS + row % VECTORS) * 8

    def visible(key: Expr, last_key: Expr) -> Expr:
        if window is None:
            return key <= last_key
        return T.And(key <= last_key, key > last_key - window)

    def slot_tile(key_tile: Expr) -> Expr:
        # a full layer never wraps: its slot is its position; a pair's second tile may be hidden
        return T.min(key_tile, key_tiles - 1) if window is None else key_tile % key_tiles

    def float32(x: Expr) -> Expr:
        return x if dtype == "float32" else x.astype("float32")

    def hide(is_visible: Expr, x: Expr) -> Expr:
        return T.Select(is_visible, x, const(HIDDEN, "float32"))

    def num_pairs(first_tile: Expr, end_tile: Expr) -> Expr:
        """Pairs of tiles with keys that may be seen; the last pair's second tile may have none."""
        tiles = T.max(T.min(end_tile - first_tile, T.int64(TILES_PER_CHUNK)), T.int64(0))
        return (tiles + (VECTORS - 1)) // VECTORS

    @T.macro
    def fetch_tile(keys, values, kv_head, first_tile, tile):  # type: ignore[no-untyped-def]
        for i in T.unroll(head_dim * KEYS_PER_TILE // line):
            T.evaluate(
                fetch(
                    keys[
                        kv_head,
                        slot_tile(first_tile + TILES_PER_CHUNK + tile),
                        i * line // KEYS_PER_TILE,
                        0,
                    ]
                )
            )
        for i in T.unroll(KEYS_PER_TILE * head_dim // line):
            T.evaluate(
                fetch(
                    values[
                        kv_head,
                        slot_tile(first_tile + tile) * KEYS_PER_TILE + i * line // head_dim,
                        i * line % head_dim,
                    ]
                )
            )

    @T.macro
    def attend(  # type: ignore[no-untyped-def]
        queries,
        keys,
        values,
        out,
        largest,
        total,
        weight,
        kv_head,
        query_at,
        out_at,
        state,
        first_tile,
        end_tile,
        last_key,
    ):
        sums = T.alloc_buffer((together * VECTORS, KEYS_PER_TILE), "float32", scope="local")
        top = T.alloc_buffer((KEYS_PER_TILE,), "float32", scope="local")
        before = T.alloc_buffer((group,), "float32", scope="local")
        for part in range(T.int64(parts)):
            for pair in range(num_pairs(first_tile, end_tile)):
                for tile in T.unroll(fetched):
                    fetch_tile(
                        keys, values, kv_head, first_tile, (part * pairs + pair) * fetched + tile
                    )
                for row in range(together * VECTORS):
                    for lane in range(KEYS_PER_TILE):
                        sums[row, lane] = T.float32(0.0)
                for d in range(T.int64(head_dim)):
                    for row in range(together * VECTORS):
                        for lane in range(KEYS_PER_TILE):
                            sums[row, lane] += queries[
                                query_at, kv_head * group + part * together + row // VECTORS, d
                            ] * float32(
                                keys[
                                    kv_head,
                                    slot_tile(first_tile + pair * VECTORS + row % VECTORS),
                                    d,
                                    lane,
                                ]
                            )
                for row in range(together * VECTORS):
                    for lane in range(KEYS_PER_TILE):
                        weight[
                            part * together + row // VECTORS,
                            (pair * VECTORS + row % VECTORS) * KEYS_PER_TILE + lane,
                        ] = hide(
                            visible(
                                (first_tile + pair * VECTORS + row % VECTORS) * KEYS_PER_TILE
                                + lane,
                                last_key,
                            ),
                            sums[row, lane],
                        )
        for head in range(T.int64(group)):
            before[head] = largest[state, head]
            for lane in range(KEYS_PER_TILE):
                top[lane] = largest[state, head]
            for tile in range(num_pairs(first_tile, end_tile) * VECTORS):
                for lane in range(KEYS_PER_TILE):
                    top[lane] = T.max(top[lane], weight[head, tile * KEYS_PER_TILE + lane])
            for key in range(KEYS_PER_TILE):
                largest[state, head] = T.max(largest[state, head], top[key])
            before[head] = T.exp(before[head] - largest[state, head])
            for lane in range(KEYS_PER_TILE):
                top[lane] = T.float32(0.0)
            for tile in range(num_pairs(first_tile, end_tile) * VECTORS):
                for lane in range(KEYS_PER_TILE):
                    # of a hidden key e^-87 at most: nothing beside the largest, which counts 1
                    weight[head, tile * KEYS_PER_TILE + lane] = T.exp(
                        weight[head, tile * KEYS_PER_TILE + lane] - largest[state, head]
                    )
                for lane in range(KEYS_PER_TILE):
                    top[lane] += weight[head, tile * KEYS_PER_TILE + lane]
            total[state, head] *= before[head]
            for key in range(KEYS_PER_TILE):
                total[state, head] += top[key]
        for part, dims in T.grid(T.int64(parts), T.int64(head_dim // (VECTORS * 8))):
            for row in range(together * VECTORS):
                for lane in range(8):
                    sums[row, lane] = (
                        out[out_at, column(kv_head, part, row, dims) + lane]
                        * before[part * together + row // VECTORS]
                    )
            for tile in range(num_pairs(first_tile, end_tile) * VECTORS):
                for key in range(KEYS_PER_TILE):
                    for row in range(together * VECTORS):
                        for lane in range(8):
                            sums[row, lane] += weight[
                                part * together + row // VECTORS, tile * KEYS_PER_TILE + key
                            ] * float32(
                                values[
                                    kv_head,
                                    slot_tile(first_tile + tile) * KEYS_PER_TILE + key,
                                    (dims * VECTORS + row % VECTORS) * 8 + lane,
                                ]
                            )
            for row in range(together * VECTORS):
                for lane in range(8):
                    out[out_at, column(kv_head, part, row, dims) + lane] = sums[row, lane]

    extend: Callable[..., object] = attend
    return extend
