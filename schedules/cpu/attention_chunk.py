"""One chunk of keys in attention: two small matrix products, scores = queries x keys and weights x
values. The rows of a task are the query heads that share a KV head, for some tokens.

The chunk's keys, and then its values, are unpacked to float32 once, into a panel in the first-level
cache, unless the sums of all rows fit in registers. Between the products the softmax goes on from
chunk to chunk (online).
"""

from collections.abc import Callable
from operator import add

from tvm import DataType
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ...targets import Target
from ..formats import const, is_few
from ..product import whole_parts
from ..records import Choose
from .prefetch import LINE_BYTES, fetch

KEYS = 64  # in a chunk: a panel of 64 elements a key takes 16 kB
TOKENS_PER_TASK = 8  # of a tile: each unpacked chunk serves so many tokens x heads
STACK_BYTES = 1023  # the largest buffer that TVM puts on the stack
HIDDEN = -1e30  # score of a key that must not be seen
ROWS_TOGETHER = (1, 2, 4, 8)  # rows of queries whose sums are in registers at once
VECTORS_TOGETHER = (1, 2, 4)  # of keys, and then of elements of a value


class Chunks:
    """Sizes of the kernel, and the statements that go through one chunk of keys."""

    def __init__(self, function: PrimFunc, target: Target) -> None:
        buffers = {parameter.name: parameter for parameter in function.params}
        self.buffers = buffers
        self.num_tokens, heads, head_dim = buffers["queries"].shape
        self.heads, self.head_dim = int(heads), int(head_dim)
        self.kv_heads, self.page_tiles, _, self.tile = (int(e) for e in buffers["keys"].shape[1:])
        self.group = self.heads // self.kv_heads
        self.tiles = KEYS // self.tile  # in a chunk
        self.window = int(function.attrs["window"]) or None
        self.tile_rows = int(function.attrs["tile_rows"])
        self.dtype = str(buffers["keys"].dtype)
        # at least a tile: LLVM splits vectors where registers are narrower
        self.lanes = max(min(target.register_bits // 32, self.head_dim), self.tile)
        self.single = is_few(self.num_tokens)  # a row a task: memory limits its speed
        self.tokens_per_task = 1 if self.single else TOKENS_PER_TASK

    def choose(self, choose: Choose, target: Target) -> None:
        """Choose the sums kept in registers: half of the registers, the factors need the rest."""
        half = target.num_registers // 2 * target.register_bits // (32 * self.lanes)
        rows, default = whole_parts(self.group, ROWS_TOGETHER, half if self.single else half // 2)
        self.rows = choose("rows_together", rows, default)
        fitting = half // self.rows
        if self.single:  # the fetches would keep larger sums in memory
            fitting = min(fitting, STACK_BYTES // (4 * self.rows * self.lanes))
        vectors, default = whole_parts(self.head_dim // self.lanes, VECTORS_TOGETHER, fitting)
        self.vectors = choose("vectors_together", vectors, default)

    def visible(self, lane: Expr, first_key: Expr, last_key: Expr) -> Expr:
        """Whether a token whose own key is `last_key` sees key `first_key` + lane."""
        last = (last_key - first_key).astype("int32")  # vectors compare 32 bits
        if self.window is None:
            return lane <= last
        return T.And(lane <= last, lane > last - self.window)

    def page(self, table: Expr, key_tile: Expr) -> Expr:
        """Return the page of a tile of keys, from the table that begins at `table`."""
        return self.buffers["tables"][table + key_tile // self.page_tiles].astype("int64")

    def fact(self, row: Expr, column: int) -> Expr:
        """Return what the step is told of a row."""
        return self.buffers["rows"][row, column].astype("int64")

    def first_tile(self, last_key: Expr) -> Expr:
        """Return the tile of the first key visible to the token whose own key is `last_key`."""
        if self.window is None:
            return T.int64(0)
        return T.max(last_key - (self.window - 1), T.int64(0)) // self.tile

    def column(self, kv_head: Expr, row: Expr) -> Expr:
        """Return where the head of a row begins in a token's output."""
        return (kv_head * self.group + row % self.group) * self.head_dim

    def num_chunks(self, first_tile: Expr, end_tile: Expr) -> Expr:
        return (end_tile - first_tile + (self.tiles - 1)) // self.tiles

    def num_steps(self, key_tile: Expr, end_tile: Expr) -> Expr:
        """Return the steps through a chunk up to `end_tile`, where the visible keys end."""
        tiles = T.min(end_tile - key_tile, T.int64(self.tiles))
        per_step = self.lanes * self.vectors // self.tile
        return (tiles + (per_step - 1)) // per_step

    @property
    def extend(self) -> Callable[..., object]:
        """The statements that take `num_tokens` tokens from one chunk of keys to the next."""
        queries, keys, values = (self.buffers[n] for n in ("queries", "keys", "values"))
        lanes, rows, vectors, tile = self.lanes, self.rows, self.vectors, self.tile
        group, head_dim, dtype, tiles = self.group, self.head_dim, self.dtype, self.tiles
        column, page, visible, page_tiles = self.column, self.page, self.visible, self.page_tiles
        step = lanes * vectors  # keys, and then elements of a value
        direct = self.single and rows == group  # a panel used once does not repay its making
        line = LINE_BYTES // DataType(dtype).itemsize
        # while a step multiplies for so many rounds, it fetches as much of the next chunk. The
        # fetches are spread evenly: in a burst they would delay each other, and the loads
        rounds = max(1, line // step)
        lines = max(1, step // line) if self.single else 0  # fetched in these rounds

        def float32(x: Expr) -> Expr:
            return x if dtype == "float32" else x.astype("float32")

        # `at` counts elements into the chunk; where a page ends within it, the fetch is in vain
        def fetched_key(table: Expr, kv_head: Expr, key_tile: Expr, at: Expr) -> Expr:
            return fetch(keys[page(table, key_tile), kv_head, key_tile % page_tiles, 0, at])

        def fetched_value(table: Expr, kv_head: Expr, key_tile: Expr, at: Expr) -> Expr:
            return fetch(values[page(table, key_tile), kv_head, key_tile % page_tiles * tile, at])

        def key_at(table: Expr, kv_head: Expr, key_tile: Expr, d: Expr, lane: Expr) -> Expr:
            return float32(keys[page(table, key_tile), kv_head, key_tile % page_tiles, d, lane])

        def key_of(
            panel: Buffer,
            table: Expr,
            kv_head: Expr,
            key_tile: Expr,
            d: Expr,
            vector: Expr,
            lane: Expr,
        ) -> Expr:
            if not direct:
                return panel[d * KEYS + vector * lanes + lane]
            at = vector * lanes + lane
            return key_at(table, kv_head, key_tile + at // tile, d, at % tile)

        def value_at(table: Expr, kv_head: Expr, key_tile: Expr, i: Expr, d: Expr) -> Expr:
            of_i = key_tile + i // tile
            slot = of_i % page_tiles * tile + i % tile
            return float32(values[page(table, of_i), kv_head, slot, d])

        def value_of(
            panel: Buffer, table: Expr, kv_head: Expr, key_tile: Expr, i: Expr, d: Expr
        ) -> Expr:
            return value_at(table, kv_head, key_tile, i, d) if direct else panel[i * head_dim + d]

        def hidden(seen: Expr, x: Expr) -> Expr:
            return T.Select(seen, x, const(HIDDEN, "float32"))

        def across(top: Buffer, combine: Callable[[Expr, Expr], Expr]) -> Expr:
            """Combine all lanes into one number."""
            x, n = top.vload([0], f"float32x{lanes}"), lanes
            while n > 1:
                n //= 2
                low, high = list(range(n)), list(range(n, 2 * n))
                x = combine(T.Shuffle([x], low), T.Shuffle([x], high))
            return x

        @T.macro
        def extend(  # type: ignore[no-untyped-def]
            out,
            panel,
            weight,
            largest,
            total,
            shrink,
            num_tokens,
            table,
            kv_head,
            first_token,
            first_out,
            first_state,
            key_tile,
            num_steps,
            first_last_key,
        ):
            sums = T.alloc_buffer((rows, vectors * lanes), "float32")
            top = T.alloc_buffer((lanes,), "float32")
            if not direct:
                for i in range(num_steps * (step // tile)):
                    for d in range(T.int64(head_dim)):
                        for lane in T.vectorized(tile):
                            panel[d * KEYS + i * tile + lane] = key_at(
                                table, kv_head, key_tile + i, d, lane
                            )
            for block in range(num_tokens * (group // rows)):
                for i in range(num_steps):
                    for r, v in T.grid(rows, vectors):
                        for lane in T.vectorized(lanes):
                            sums[r, v * lanes + lane] = T.float32(0.0)
                    for d in range(T.int64(head_dim // rounds)):
                        for f in T.unroll(lines):
                            T.evaluate(
                                fetched_key(
                                    table,
                                    kv_head,
                                    key_tile + tiles,
                                    i * (step * head_dim) + (d * lines + f) * line,
                                )
                            )
                        for n in T.unroll(rounds):
                            for r in T.unroll(rows):
                                for v in T.unroll(vectors):
                                    for lane in T.vectorized(lanes):
                                        sums[r, v * lanes + lane] += queries[
                                            first_token + block * rows // group,
                                            kv_head * group + block * rows % group + r,
                                            d * rounds + n,
                                        ] * key_of(
                                            panel,
                                            table,
                                            kv_head,
                                            key_tile,
                                            d * rounds + n,
                                            i * vectors + v,
                                            lane,
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
                        # a hidden key weighs 0, not e^-87, whose products would be slow denormals
                        weight[row, i * lanes + lane] = T.Select(
                            weight[row, i * lanes + lane] > T.float32(HIDDEN / 2),
                            T.exp(weight[row, i * lanes + lane] - largest[first_state, row]),
                            T.float32(0.0),
                        )
                    for lane in T.vectorized(lanes):
                        top[lane] += weight[row, i * lanes + lane]
                total[first_state, row] = total[first_state, row] * shrink[row] + across(top, add)
            if not direct:
                for i in range(num_steps * step):
                    for d in range(T.int64(head_dim // lanes)):
                        for lane in T.vectorized(lanes):
                            panel[i * head_dim + d * lanes + lane] = value_at(
                                table, kv_head, key_tile, i, d * lanes + lane
                            )
            for block in range(num_tokens * (group // rows)):
                for dims in range(T.int64(head_dim // step)):
                    for r in T.unroll(rows):
                        for v in T.unroll(vectors):
                            for lane in T.vectorized(lanes):
                                sums[r, v * lanes + lane] = (
                                    out[
                                        first_out + block * rows // group,
                                        column(kv_head, block * rows + r)
                                        + dims * step
                                        + v * lanes
                                        + lane,
                                    ]
                                    * shrink[block * rows + r]
                                )
                    for i in range(num_steps * (step // rounds)):
                        for f in T.unroll(lines):
                            T.evaluate(
                                fetched_value(
                                    table,
                                    kv_head,
                                    key_tile + tiles,
                                    dims * (KEYS * step) + (i * lines + f) * line,
                                )
                            )
                        for n in T.unroll(rounds):
                            for r in T.unroll(rows):
                                for v in T.unroll(vectors):
                                    for lane in T.vectorized(lanes):
                                        sums[r, v * lanes + lane] += weight[
                                            block * rows + r, i * rounds + n
                                        ] * value_of(
                                            panel,
                                            table,
                                            kv_head,
                                            key_tile,
                                            i * rounds + n,
                                            dims * step + v * lanes + lane,
                                        )
                    for r in T.unroll(rows):
                        for v in T.unroll(vectors):
                            for lane in T.vectorized(lanes):
                                out[
                                    first_out + block * rows // group,
                                    column(kv_head, block * rows + r)
                                    + dims * step
                                    + v * lanes
                                    + lane,
                                ] = sums[r, v * lanes + lane]

        return extend  # type: ignore[no-any-return]
