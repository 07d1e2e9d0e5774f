"""Attention over the KV cache in chunks of keys, which all queries of a task share.

The query heads that share a KV head, of some tokens, are the rows of two small matrix products a
chunk: scores = queries x keys, and weights x values. A chunk's keys and values are unpacked to
float32 once, into panels in the first-level cache; between the products the softmax goes on from
chunk to chunk (online), beginning with the sink: a maximum with mass 1 and no value.
"""

from collections.abc import Callable

from tvm import DataType
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, IntImm, PrimFunc, Stmt

from ...targets import Target
from ..formats import const
from ..records import Choose
from .prefetch import LINE_BYTES, fetch
from .product import whole_parts

KEYS = 64  # of a chunk: its two panels of 64 elements a key take 32 kB
TOKENS_PER_TASK = 8  # of a prefill: each unpacked chunk serves so many tokens x heads
PARTS = 8  # of the context of one token: enough tasks for many cores
HIDDEN = -1e30  # score of a key that must not be seen
ROWS_TOGETHER = (1, 2, 4, 8)  # of queries, whose sums are in registers
VECTORS_TOGETHER = (1, 2, 4)  # of keys, and then of elements of a value


def attention(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule attention; declines other kernels, and heads that do not fill vectors."""
    if str(function.attrs["op"]) != "attention":
        return None
    chunks = _Chunks(function, target)
    if chunks.head_dim % chunks.lanes or KEYS % chunks.lanes:
        return None
    chunks.choose(choose, target)
    one_of_all = isinstance(chunks.num_tokens, IntImm) and chunks.window is None
    return Schedule(function.with_body(_parts(chunks) if one_of_all else _tokens(chunks)))


class _Chunks:
    """Sizes of the kernel, and the statements that go through one chunk of keys."""

    def __init__(self, function: PrimFunc, target: Target) -> None:
        buffers = {parameter.name: parameter for parameter in function.params}
        self.buffers = buffers
        self.num_tokens, heads, head_dim = buffers["queries"].shape
        self.heads, self.head_dim = int(heads), int(head_dim)
        self.kv_heads, self.key_tiles, _, self.tile = (int(e) for e in buffers["keys"].shape)
        self.group = self.heads // self.kv_heads
        self.window = int(function.attrs["window"]) or None
        self.dtype = str(buffers["keys"].dtype)
        # at least a tile: LLVM splits vectors where registers are narrower
        self.lanes = max(min(target.register_bits // 32, self.head_dim), self.tile)
        one = isinstance(self.num_tokens, IntImm)
        self.tokens_per_task = int(self.num_tokens) if one else TOKENS_PER_TASK

    def choose(self, choose: Choose, target: Target) -> None:
        """Sums in half of the registers: the rest is for what is multiplied."""
        half = target.num_registers // 2 * target.register_bits // (32 * self.lanes)
        rows, default = whole_parts(self.group, ROWS_TOGETHER, half // 2)
        self.rows = choose("rows_together", rows, default)
        fitting = half // self.rows
        vectors, default = whole_parts(self.head_dim // self.lanes, VECTORS_TOGETHER, fitting)
        self.vectors = choose("vectors_together", vectors, default)

    def visible(self, lane: Expr, first_key: Expr, last_key: Expr) -> Expr:
        """Whether a token whose own key is `last_key` sees key `first_key` + lane."""
        last = (last_key - first_key).astype("int32")  # vectors compare 32 bits
        if self.window is None:
            return lane <= last
        return T.And(lane <= last, lane > last - self.window)

    def slot(self, key_tile: Expr) -> Expr:
        """Where a tile of keys lies; a full layer never wraps, but what is fetched ahead may."""
        if self.window is None:
            return T.min(key_tile, const(self.key_tiles - 1, "int64"))
        return key_tile % self.key_tiles

    def first_tile(self, last_key: Expr) -> Expr:
        """The tile of the first key that a token sees whose own key is `last_key`."""
        if self.window is None:
            return T.int64(0)
        return T.max(last_key - (self.window - 1), T.int64(0)) // self.tile

    @property
    def extend(self) -> Callable[..., object]:
        """Statements that take `num_tokens` tokens from one chunk of keys to the next."""
        lanes, rows, vectors, tile, group = (
            self.lanes,
            self.rows,
            self.vectors,
            self.tile,
            self.group,
        )
        head_dim, dtype, slot, visible = self.head_dim, self.dtype, self.slot, self.visible
        step = lanes * vectors  # keys
        single = self.tokens_per_task == 1  # one token reads keys from memory: fetch them ahead
        line = LINE_BYTES // DataType(dtype).itemsize
        lines = step * head_dim // line if single else 0
        part = vectors * lanes  # elements of a value
        value_lines = KEYS * head_dim // line * part // head_dim if single else 0

        def float32(x: Expr) -> Expr:
            return x if dtype == "float32" else x.astype("float32")

        def column(kv_head: Expr, row: Expr) -> Expr:
            return (kv_head * group + row % group) * head_dim

        def fetched_key(keys: Buffer, kv_head: Expr, key_tile: Expr, i: Expr) -> Expr:
            at = i * line
            size = head_dim * tile
            d = at % size // tile
            return fetch(keys[kv_head, slot(key_tile + at // size), d, at % tile])

        def fetched_value(values: Buffer, kv_head: Expr, key_tile: Expr, i: Expr) -> Expr:
            key, d = i * line // head_dim, i * line % head_dim
            return fetch(values[kv_head, slot(key_tile + key // tile) * tile + key % tile, d])

        def hidden(seen: Expr, x: Expr) -> Expr:
            return T.Select(seen, x, const(HIDDEN, "float32"))

        def plus(a: Expr, b: Expr) -> Expr:
            return a + b

        def across(top: Buffer, combine: Callable[[Expr, Expr], Expr]) -> Expr:
            """One number of all lanes."""
            x, n = top.vload([0], f"float32x{lanes}"), lanes
            while n > 1:
                n //= 2
                low, high = list(range(n)), list(range(n, 2 * n))
                x = combine(T.Shuffle([x], low), T.Shuffle([x], high))
            return x

        @T.macro
        def extend(  # type: ignore[no-untyped-def]
            queries,
            keys,
            values,
            out,
            panel,
            weight,
            largest,
            total,
            shrink,
            num_tokens,
            kv_head,
            first_token,
            first_out,
            first_state,
            key_tile,
            num_steps,
            first_last_key,
        ):
            sums = T.alloc_buffer((rows, vectors * lanes), "float32", scope="local")
            top = T.alloc_buffer((lanes,), "float32", scope="local")
            for i in range(num_steps * (step // tile)):
                for d in range(T.int64(head_dim)):
                    for lane in T.vectorized(tile):
                        panel[d * KEYS + i * tile + lane] = float32(
                            keys[kv_head, slot(key_tile + i), d, lane]
                        )
            for block in range(num_tokens * (group // rows)):
                for i in range(num_steps):
                    for f in T.unroll(lines):
                        T.evaluate(
                            fetched_key(
                                keys, kv_head, key_tile + KEYS // tile + i * (step // tile), f
                            )
                        )
                    for r, v in T.grid(rows, vectors):
                        for lane in T.vectorized(lanes):
                            sums[r, v * lanes + lane] = T.float32(0.0)
                    for d in range(T.int64(head_dim)):
                        for r in T.unroll(rows):
                            for v in T.unroll(vectors):
                                for lane in T.vectorized(lanes):
                                    sums[r, v * lanes + lane] += (
                                        queries[
                                            first_token + block * rows // group,
                                            kv_head * group + block * rows % group + r,
                                            d,
                                        ]
                                        * panel[d * KEYS + i * step + v * lanes + lane]
                                    )
                    for r in T.unroll(rows):
                        for v in T.unroll(vectors):
                            for lane in T.vectorized(lanes):
                                weight[block * rows + r, i * step + v * lanes + lane] = hidden(
                                    visible(
                                        v * lanes + lane,
                                        key_tile * tile + i * step,
                                        first_last_key + block * rows // group,
                                    ),
                                    sums[r, v * lanes + lane],
                                )
            for row in range(num_tokens * group):
                shrink[row] = largest[first_state, row]
                for lane in T.vectorized(lanes):
                    top[lane] = largest[first_state, row]
                for i in range(num_steps * vectors):
                    for lane in T.vectorized(lanes):
                        top[lane] = T.max(top[lane], weight[row, i * lanes + lane])
                largest[first_state, row] = across(top, T.max)
                shrink[row] = T.exp(shrink[row] - largest[first_state, row])
                for lane in T.vectorized(lanes):
                    top[lane] = T.float32(0.0)
                for i in range(num_steps * vectors):
                    for lane in T.vectorized(lanes):
                        # 0 of a hidden key, not e^-87: its products would be slow denormals
                        weight[row, i * lanes + lane] = T.Select(
                            weight[row, i * lanes + lane] > T.float32(HIDDEN / 2),
                            T.exp(weight[row, i * lanes + lane] - largest[first_state, row]),
                            T.float32(0.0),
                        )
                    for lane in T.vectorized(lanes):
                        top[lane] += weight[row, i * lanes + lane]
                total[first_state, row] = total[first_state, row] * shrink[row] + across(top, plus)
            for i in range(num_steps * step):
                for d in range(T.int64(head_dim // lanes)):
                    for lane in T.vectorized(lanes):
                        panel[i * head_dim + d * lanes + lane] = float32(
                            values[
                                kv_head,
                                slot(key_tile + i // tile) * tile + i % tile,
                                d * lanes + lane,
                            ]
                        )
            for block in range(num_tokens * (group // rows)):
                for dims in range(T.int64(head_dim // part)):
                    for f in T.unroll(value_lines):
                        T.evaluate(
                            fetched_value(
                                values, kv_head, key_tile + KEYS // tile, dims * value_lines + f
                            )
                        )
                    for r in T.unroll(rows):
                        for v in T.unroll(vectors):
                            for lane in T.vectorized(lanes):
                                sums[r, v * lanes + lane] = (
                                    out[
                                        first_out + block * rows // group,
                                        column(kv_head, block * rows + r)
                                        + dims * part
                                        + v * lanes
                                        + lane,
                                    ]
                                    * shrink[block * rows + r]
                                )
                    for i in range(num_steps * step):
                        for r in T.unroll(rows):
                            for v in T.unroll(vectors):
                                for lane in T.vectorized(lanes):
                                    sums[r, v * lanes + lane] += (
                                        weight[block * rows + r, i]
                                        * panel[i * head_dim + dims * part + v * lanes + lane]
                                    )
                    for r in T.unroll(rows):
                        for v in T.unroll(vectors):
                            for lane in T.vectorized(lanes):
                                out[
                                    first_out + block * rows // group,
                                    column(kv_head, block * rows + r)
                                    + dims * part
                                    + v * lanes
                                    + lane,
                                ] = sums[r, v * lanes + lane]

        return extend  # type: ignore[no-any-return]

    def num_steps(self, key_tile: Expr, end_tile: Expr) -> Expr:
        """Of a chunk, up to the tile where the visible keys end."""
        tiles = T.min(end_tile - key_tile, T.int64(KEYS // self.tile))
        per_step = self.lanes * self.vectors // self.tile
        return (tiles + (per_step - 1)) // per_step


def _tokens(chunks: _Chunks) -> Stmt:
    """A task is some tokens and one KV head."""
    group, head_dim, tile, per_task = (
        chunks.group,
        chunks.head_dim,
        chunks.tile,
        chunks.tokens_per_task,
    )
    kv_heads, num_tokens, lanes, extend = (
        chunks.kv_heads,
        chunks.num_tokens,
        chunks.lanes,
        chunks.extend,
    )
    queries, keys, values, sinks, position, out = (
        chunks.buffers[n] for n in ("queries", "keys", "values", "sinks", "position", "out")
    )
    tiles_per_chunk = KEYS // tile

    def first_token(task: Expr) -> Expr:
        return task // kv_heads * per_task

    def tokens_of(task: Expr) -> Expr:
        return T.min(T.int64(per_task), num_tokens - first_token(task))

    def last_key(task: Expr) -> Expr:
        return position[0].astype("int64") + first_token(task)

    def first_tile(task: Expr) -> Expr:
        return chunks.first_tile(last_key(task))

    def end_tile(task: Expr) -> Expr:
        return (last_key(task) + tokens_of(task) - 1) // tile + 1

    def column(task: Expr, row: Expr) -> Expr:
        return (task % kv_heads * group + row % group) * head_dim

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for task in T.parallel((num_tokens + (per_task - 1)) // per_task * kv_heads):
            panel = T.alloc_buffer((KEYS * head_dim,), "float32")
            weight = T.alloc_buffer((per_task * group, KEYS), "float32")
            largest = T.alloc_buffer((1, per_task * group), "float32", scope="local")
            total = T.alloc_buffer((1, per_task * group), "float32", scope="local")
            shrink = T.alloc_buffer((per_task * group,), "float32", scope="local")
            for row in range(tokens_of(task) * group):
                largest[0, row] = sinks[task % kv_heads * group + row % group]
                total[0, row] = T.float32(1.0)
                for d in range(T.int64(head_dim // lanes)):
                    for lane in T.vectorized(lanes):
                        out[
                            first_token(task) + row // group, column(task, row) + d * lanes + lane
                        ] = T.float32(0.0)
            for chunk in range(
                (end_tile(task) - first_tile(task) + (tiles_per_chunk - 1)) // tiles_per_chunk
            ):
                extend(
                    queries,
                    keys,
                    values,
                    out,
                    panel,
                    weight,
                    largest,
                    total,
                    shrink,
                    tokens_of(task),
                    task % kv_heads,
                    first_token(task),
                    first_token(task),
                    T.int64(0),
                    first_tile(task) + chunk * tiles_per_chunk,
                    chunks.num_steps(first_tile(task) + chunk * tiles_per_chunk, end_tile(task)),
                    last_key(task),
                )
            for row in range(tokens_of(task) * group):
                for d in range(T.int64(head_dim // lanes)):
                    for lane in T.vectorized(lanes):
                        out[
                            first_token(task) + row // group, column(task, row) + d * lanes + lane
                        ] = (
                            out[
                                first_token(task) + row // group,
                                column(task, row) + d * lanes + lane,
                            ]
                            / total[0, row]
                        )

    return body.body


def _parts(chunks: _Chunks) -> Stmt:
    """One token that sees the whole context: a task is a part of it and one KV head; the parts are
    merged at the end."""
    group, head_dim, tile, lanes, extend = (
        chunks.group,
        chunks.head_dim,
        chunks.tile,
        chunks.lanes,
        chunks.extend,
    )
    heads, kv_heads = chunks.heads, chunks.kv_heads
    queries, keys, values, sinks, position, out = (
        chunks.buffers[n] for n in ("queries", "keys", "values", "sinks", "position", "out")
    )
    tiles_per_chunk = KEYS // tile

    def last_key() -> Expr:
        return position[0].astype("int64")

    def first_tile(part: Expr) -> Expr:
        """Parts differ by one chunk at most; a short context leaves some of them empty."""
        num_tiles = last_key() // tile + 1
        num_chunks = (num_tiles + (tiles_per_chunk - 1)) // tiles_per_chunk
        return T.min(num_chunks * part // PARTS * tiles_per_chunk, num_tiles)

    def num_chunks(part: Expr) -> Expr:
        num_tiles = first_tile(part + 1) - first_tile(part)
        return (num_tiles + (tiles_per_chunk - 1)) // tiles_per_chunk

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        partial = T.alloc_buffer((PARTS, heads * head_dim), "float32")
        largest = T.alloc_buffer((PARTS * kv_heads, group), "float32")
        total = T.alloc_buffer((PARTS * kv_heads, group), "float32")
        for task in T.parallel(T.int64(PARTS * kv_heads)):
            panel = T.alloc_buffer((KEYS * head_dim,), "float32")
            weight = T.alloc_buffer((group, KEYS), "float32")
            shrink = T.alloc_buffer((group,), "float32", scope="local")
            for row in range(T.int64(group)):
                largest[task, row] = T.float32(HIDDEN)
                total[task, row] = T.float32(0.0)
                if num_chunks(task // kv_heads) > 0:
                    for d in range(T.int64(head_dim // lanes)):
                        for lane in T.vectorized(lanes):
                            partial[
                                task // kv_heads,
                                (task % kv_heads * group + row) * head_dim + d * lanes + lane,
                            ] = T.float32(0.0)
            for chunk in range(num_chunks(task // kv_heads)):
                extend(
                    queries,
                    keys,
                    values,
                    partial,
                    panel,
                    weight,
                    largest,
                    total,
                    shrink,
                    T.int64(1),
                    task % kv_heads,
                    T.int64(0),
                    task // kv_heads,
                    task,
                    first_tile(task // kv_heads) + chunk * tiles_per_chunk,
                    chunks.num_steps(
                        first_tile(task // kv_heads) + chunk * tiles_per_chunk,
                        first_tile(task // kv_heads + 1),
                    ),
                    last_key(),
                )
        for head in range(T.int64(heads)):
            best = T.alloc_buffer((1,), "float32", scope="local")
            mass = T.alloc_buffer((1,), "float32", scope="local")
            share = T.alloc_buffer((1,), "float32", scope="local")
            best[0] = sinks[head]
            for part in range(T.int64(PARTS)):
                best[0] = T.max(best[0], largest[part * kv_heads + head // group, head % group])
            mass[0] = T.exp(sinks[head] - best[0])
            for d in range(T.int64(head_dim // lanes)):
                for lane in T.vectorized(lanes):
                    out[0, head * head_dim + d * lanes + lane] = T.float32(0.0)
            for part in range(T.int64(PARTS)):
                if total[part * kv_heads + head // group, head % group] > T.float32(0.0):
                    share[0] = T.exp(
                        largest[part * kv_heads + head // group, head % group] - best[0]
                    )
                    mass[0] += total[part * kv_heads + head // group, head % group] * share[0]
                    for d in range(T.int64(head_dim // lanes)):
                        for lane in T.vectorized(lanes):
                            out[0, head * head_dim + d * lanes + lane] += (
                                partial[part, head * head_dim + d * lanes + lane] * share[0]
                            )
            for d in range(T.int64(head_dim // lanes)):
                for lane in T.vectorized(lanes):
                    out[0, head * head_dim + d * lanes + lane] = (
                        out[0, head * head_dim + d * lanes + lane] / mass[0]
                    )

    return body.body
