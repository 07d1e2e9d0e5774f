"""Attention over the KV cache in chunks of keys (`attention_chunk.py`), shared out over the cores.

The softmax begins with the sink: a maximum with mass 1 and no value.
"""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Stmt

from ...targets import Target
from ..formats import POSITION, TABLE
from ..records import Choose
from .attention_chunk import HIDDEN, KEYS, Chunks

PARTS = 8  # of one token's context: enough tasks for many cores


def attention(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule attention; declines other kernels, and heads that do not fill vectors."""
    if str(function.attrs["op"]) != "attention":
        return None
    chunks = Chunks(function, target)
    if chunks.head_dim % chunks.lanes or KEYS % chunks.lanes:
        return None
    chunks.choose(choose, target)
    in_parts = chunks.single and chunks.window is None
    return Schedule(function.with_body(_parts(chunks) if in_parts else _tokens(chunks)))


def _tokens(chunks: Chunks) -> Stmt:
    """Attend in tasks, each of some tokens of a sequence, one after the other, and one KV head."""
    kv_heads, group, head_dim, lanes = chunks.kv_heads, chunks.group, chunks.head_dim, chunks.lanes
    per_task, fact, column, extend = (
        chunks.tokens_per_task,
        chunks.fact,
        chunks.column,
        chunks.extend,
    )
    sinks, out = (chunks.buffers[n] for n in ("sinks", "out"))
    tiles = chunks.buffers.get("tiles")
    per_tile = chunks.tile_rows // per_task  # tasks
    count = chunks.num_tokens if tiles is None else tiles.shape[0] * per_tile

    def first_token(task: Expr) -> Expr:
        if tiles is None:
            return task // kv_heads
        tile = task // kv_heads // per_tile
        return tiles[tile, 0].astype("int64") + task // kv_heads % per_tile * per_task

    def tokens_of(task: Expr) -> Expr:
        if tiles is None:
            return T.int64(1)
        tile = task // kv_heads // per_tile
        left = tiles[tile, 1].astype("int64") - task // kv_heads % per_tile * per_task
        return T.min(T.int64(per_task), left)

    def last_key(task: Expr) -> Expr:
        return fact(first_token(task), POSITION)

    def first_tile(task: Expr) -> Expr:
        return chunks.first_tile(last_key(task))

    def end_tile(task: Expr) -> Expr:
        return (last_key(task) + tokens_of(task) - 1) // chunks.tile + 1

    @T.macro
    def attend(task, panel, weight, largest, total, shrink):  # type: ignore[no-untyped-def]
        for row in range(tokens_of(task) * group):
            largest[0, row] = sinks[task % kv_heads * group + row % group]
            total[0, row] = T.float32(1.0)
            for d in range(T.int64(head_dim // lanes)):
                for lane in T.vectorized(lanes):
                    out[
                        first_token(task) + row // group,
                        column(task % kv_heads, row) + d * lanes + lane,
                    ] = T.float32(0.0)
        for chunk in range(chunks.num_chunks(first_tile(task), end_tile(task))):
            extend(
                out,
                panel,
                weight,
                largest,
                total,
                shrink,
                tokens_of(task),
                fact(first_token(task), TABLE),
                task % kv_heads,
                first_token(task),
                first_token(task),
                T.int64(0),
                first_tile(task) + chunk * chunks.tiles,
                chunks.num_steps(first_tile(task) + chunk * chunks.tiles, end_tile(task)),
                last_key(task),
            )
        for row in range(tokens_of(task) * group):
            for d in range(T.int64(head_dim // lanes)):
                for lane in T.vectorized(lanes):
                    out[
                        first_token(task) + row // group,
                        column(task % kv_heads, row) + d * lanes + lane,
                    ] = (
                        out[
                            first_token(task) + row // group,
                            column(task % kv_heads, row) + d * lanes + lane,
                        ]
                        / total[0, row]
                    )

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for task in T.parallel(count * kv_heads):
            panel = T.alloc_buffer((KEYS * head_dim,), "float32")
            weight = T.alloc_buffer((per_task * group, KEYS), "float32")
            largest = T.alloc_buffer((1, per_task * group), "float32")
            total = T.alloc_buffer((1, per_task * group), "float32")
            shrink = T.alloc_buffer((per_task * group,), "float32")
            if tokens_of(task) > 0:  # else the tile has ended before
                attend(task, panel, weight, largest, total, shrink)

    return body.body


def _parts(chunks: Chunks) -> Stmt:
    """Attend for a few tokens that see their whole context. A task takes one token, a part of its
    context and one KV head; the parts are merged at the end."""
    kv_heads, group, head_dim, lanes = chunks.kv_heads, chunks.group, chunks.head_dim, chunks.lanes
    sinks, out = (chunks.buffers[n] for n in ("sinks", "out"))
    heads, fact, column, extend = chunks.heads, chunks.fact, chunks.column, chunks.extend
    num_tokens = chunks.num_tokens

    # `slot` counts tokens and their parts
    def last_key(slot: Expr) -> Expr:
        return fact(slot // PARTS, POSITION)

    def begin(slot: Expr, part: Expr) -> Expr:
        """Return where a part begins. Parts differ by at most one chunk; short contexts leave some
        empty."""
        num_tiles = last_key(slot) // chunks.tile + 1
        all_chunks = chunks.num_chunks(T.int64(0), num_tiles)
        return T.min(all_chunks * part // PARTS * chunks.tiles, num_tiles)

    def first_tile(slot: Expr) -> Expr:
        return begin(slot, slot % PARTS)

    def end_tile(slot: Expr) -> Expr:
        return begin(slot, slot % PARTS + 1)

    def num_chunks(slot: Expr) -> Expr:
        return chunks.num_chunks(first_tile(slot), end_tile(slot))

    def state(token: Expr, part: Expr, head: Expr) -> Expr:
        """Return where the softmax of a part of a token is."""
        return (token * PARTS + part) * kv_heads + head // group

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        partial = T.alloc_buffer((num_tokens * PARTS, heads * head_dim), "float32")
        largest = T.alloc_buffer((num_tokens * PARTS * kv_heads, group), "float32")
        total = T.alloc_buffer((num_tokens * PARTS * kv_heads, group), "float32")
        for task in T.parallel(num_tokens * PARTS * kv_heads):
            panel = T.alloc_buffer((KEYS * head_dim,), "float32")
            weight = T.alloc_buffer((group, KEYS), "float32")
            shrink = T.alloc_buffer((group,), "float32")
            for row in range(T.int64(group)):
                largest[task, row] = T.float32(HIDDEN)
                total[task, row] = T.float32(0.0)
                if num_chunks(task // kv_heads) > 0:
                    for d in range(T.int64(head_dim // lanes)):
                        for lane in T.vectorized(lanes):
                            partial[
                                task // kv_heads,
                                column(task % kv_heads, row) + d * lanes + lane,
                            ] = T.float32(0.0)
            for chunk in range(num_chunks(task // kv_heads)):
                extend(
                    partial,
                    panel,
                    weight,
                    largest,
                    total,
                    shrink,
                    T.int64(1),
                    fact(task // kv_heads // PARTS, TABLE),
                    task % kv_heads,
                    task // kv_heads // PARTS,
                    task // kv_heads,
                    task,
                    first_tile(task // kv_heads) + chunk * chunks.tiles,
                    chunks.num_steps(
                        first_tile(task // kv_heads) + chunk * chunks.tiles,
                        end_tile(task // kv_heads),
                    ),
                    last_key(task // kv_heads),
                )
        for token, head in T.grid(num_tokens, heads):
            best = T.alloc_buffer((1,), "float32")
            mass = T.alloc_buffer((1,), "float32")
            share = T.alloc_buffer((1,), "float32")
            best[0] = sinks[head]
            for part in range(T.int64(PARTS)):
                best[0] = T.max(best[0], largest[state(token, part, head), head % group])
            mass[0] = T.exp(sinks[head] - best[0])
            for d in range(T.int64(head_dim // lanes)):
                for lane in T.vectorized(lanes):
                    out[token, head * head_dim + d * lanes + lane] = T.float32(0.0)
            for part in range(T.int64(PARTS)):
                if total[state(token, part, head), head % group] > T.float32(0.0):
                    share[0] = T.exp(largest[state(token, part, head), head % group] - best[0])
                    mass[0] += total[state(token, part, head), head % group] * share[0]
                    for d in range(T.int64(head_dim // lanes)):
                        for lane in T.vectorized(lanes):
                            out[token, head * head_dim + d * lanes + lane] += (
                                partial[token * PARTS + part, head * head_dim + d * lanes + lane]
                                * share[0]
                            )
            for d in range(T.int64(head_dim // lanes)):
                for lane in T.vectorized(lanes):
                    out[token, head * head_dim + d * lanes + lane] = (
                        out[token, head * head_dim + d * lanes + lane] / mass[0]
                    )

    return body.body
