"""Attention over the KV cache in chunks of keys (`attention_chunk.py`), shared out over the cores.

The softmax begins with the sink: a maximum with mass 1 and no value.
"""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import IntImm, PrimFunc, Stmt

from ...targets import Target
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
    one_of_all = isinstance(chunks.num_tokens, IntImm) and chunks.window is None
    return Schedule(function.with_body(_parts(chunks) if one_of_all else _tokens(chunks)))


def _tokens(chunks: Chunks) -> Stmt:
    """Attend in tasks, each of some tokens and one KV head."""
    kv_heads, group, head_dim, lanes = chunks.kv_heads, chunks.group, chunks.head_dim, chunks.lanes
    num_tokens, per_task = chunks.num_tokens, chunks.tokens_per_task
    sinks, position, out = (chunks.buffers[n] for n in ("sinks", "position", "out"))
    column, extend = chunks.column, chunks.extend

    def first_token(task: Expr) -> Expr:
        return task // kv_heads * per_task

    def tokens_of(task: Expr) -> Expr:
        return T.min(T.int64(per_task), num_tokens - first_token(task))

    def last_key(task: Expr) -> Expr:
        return position[0].astype("int64") + first_token(task)

    def first_tile(task: Expr) -> Expr:
        return chunks.first_tile(last_key(task))

    def end_tile(task: Expr) -> Expr:
        return (last_key(task) + tokens_of(task) - 1) // chunks.tile + 1

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for task in T.parallel((num_tokens + (per_task - 1)) // per_task * kv_heads):
            panel = T.alloc_buffer((KEYS * head_dim,), "float32")
            weight = T.alloc_buffer((per_task * group, KEYS), "float32")
            largest = T.alloc_buffer((1, per_task * group), "float32")
            total = T.alloc_buffer((1, per_task * group), "float32")
            shrink = T.alloc_buffer((per_task * group,), "float32")
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

    return body.body


def _parts(chunks: Chunks) -> Stmt:
    """Attend for one token that sees the whole context. A task takes a part of the context and one
    KV head; the parts are merged at the end."""
    kv_heads, group, head_dim, lanes = chunks.kv_heads, chunks.group, chunks.head_dim, chunks.lanes
    sinks, position, out = (chunks.buffers[n] for n in ("sinks", "position", "out"))
    heads, column, extend = chunks.heads, chunks.column, chunks.extend

    def last_key() -> Expr:
        return position[0].astype("int64")

    def first_tile(part: Expr) -> Expr:
        """Return where a part begins. Parts differ by at most one chunk; short contexts leave some
        empty."""
        num_tiles = last_key() // chunks.tile + 1
        all_chunks = chunks.num_chunks(T.int64(0), num_tiles)
        return T.min(all_chunks * part // PARTS * chunks.tiles, num_tiles)

    def num_chunks(part: Expr) -> Expr:
        return chunks.num_chunks(first_tile(part), first_tile(part + 1))

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        partial = T.alloc_buffer((PARTS, heads * head_dim), "float32")
        largest = T.alloc_buffer((PARTS * kv_heads, group), "float32")
        total = T.alloc_buffer((PARTS * kv_heads, group), "float32")
        for task in T.parallel(T.int64(PARTS * kv_heads)):
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
                    task % kv_heads,
                    T.int64(0),
                    task // kv_heads,
                    task,
                    first_tile(task // kv_heads) + chunk * chunks.tiles,
                    chunks.num_steps(
                        first_tile(task // kv_heads) + chunk * chunks.tiles,
                        first_tile(task // kv_heads + 1),
                    ),
                    last_key(),
                )
        for head in range(T.int64(heads)):
            best = T.alloc_buffer((1,), "float32")
            mass = T.alloc_buffer((1,), "float32")
            share = T.alloc_buffer((1,), "float32")
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
