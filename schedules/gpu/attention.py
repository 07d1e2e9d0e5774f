"""Attention over the KV cache: a work-group serves all query heads of a KV head for some tokens.

It goes through the keys in chunks, which it unpacks to float32 into shared memory. Between the two
products of a chunk, scores = queries x keys and weights x values, the softmax goes on from chunk to
chunk (online). The softmax begins with the sink: a maximum with mass 1 and no value.
"""

from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Stmt

from ...targets import Target
from ..records import Choose
from .token_tiles import HIDDEN, TokenTiles

SIDE = 8  # threads of a work-group in either direction
KEYS = 32  # in a chunk
TOKENS_TOGETHER = 4  # in a prefill


def attention(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule attention; declines other kernels, and heads that do not fill the work-group."""
    if str(function.attrs["op"]) != "attention":
        return None
    if int(function.params[0].shape[2]) % SIDE:
        return None
    return Schedule(function.with_body(_body(function)))


def _body(function: PrimFunc) -> Stmt:
    tiles = TokenTiles(function, TOKENS_TOGETHER, KEYS)
    queries, sinks, out, head_dim = tiles.queries, tiles.sinks, tiles.out, tiles.head_dim
    rows, columns = -(-TOKENS_TOGETHER * tiles.group // SIDE), head_dim // SIDE  # per thread
    all_rows, threads = rows * SIDE, SIDE * SIDE

    @T.macro
    def attend(kv_head, tile, ty, tx):  # type: ignore[no-untyped-def]
        query = T.alloc_buffer((all_rows, head_dim), "float32", scope="shared")
        chunk = T.alloc_buffer((KEYS * head_dim,), "float32", scope="shared")
        weight = T.alloc_buffer((all_rows, KEYS), "float32", scope="shared")
        peak = T.alloc_buffer((all_rows, SIDE), "float32", scope="shared")
        added = T.alloc_buffer((all_rows, SIDE), "float32", scope="shared")
        score = T.alloc_buffer((rows, KEYS // SIDE), "float32", scope="local")
        top = T.alloc_buffer((1,), "float32", scope="local")
        best = T.alloc_buffer((rows,), "float32", scope="local")  # the same in all threads of a row
        mass = T.alloc_buffer((rows,), "float32", scope="local")
        shrink = T.alloc_buffer((rows,), "float32", scope="local")
        acc = T.alloc_buffer((rows, columns), "float32", scope="local")
        for i in range(T.int64(all_rows * head_dim // threads)):
            query[
                (i * threads + ty * SIDE + tx) // head_dim,
                (i * threads + ty * SIDE + tx) % head_dim,
            ] = queries[
                tiles.token_of(tile, (i * threads + ty * SIDE + tx) // head_dim),
                tiles.head_of(kv_head, (i * threads + ty * SIDE + tx) // head_dim),
                (i * threads + ty * SIDE + tx) % head_dim,
            ]
        for r in T.unroll(rows):
            best[r] = sinks[tiles.head_of(kv_head, r * SIDE + ty)]
            mass[r] = T.float32(1)
        for r, c in T.grid(rows, columns):
            acc[r, c] = T.float32(0)
        for n in range(tiles.num_chunks(tile)):
            for i in range(T.int64(KEYS * head_dim // threads)):
                chunk[i * threads + ty * SIDE + tx] = tiles.key_at(
                    tile,
                    kv_head,
                    (tiles.first_chunk(tile) + n) * KEYS + (i * threads + ty * SIDE + tx) % KEYS,
                    (i * threads + ty * SIDE + tx) // KEYS,
                )
            for r in T.unroll(rows):
                for k in T.unroll(KEYS // SIDE):
                    score[r, k] = T.float32(0)
                for d in range(T.int64(head_dim)):
                    for k in T.unroll(KEYS // SIDE):
                        score[r, k] += query[r * SIDE + ty, d] * chunk[d * KEYS + k * SIDE + tx]
                top[0] = T.float32(HIDDEN)
                for k in T.unroll(KEYS // SIDE):
                    score[r, k] = T.Select(
                        tiles.visible(
                            tile,
                            r * SIDE + ty,
                            (tiles.first_chunk(tile) + n) * KEYS + k * SIDE + tx,
                        ),
                        score[r, k],
                        T.float32(HIDDEN),
                    )
                    top[0] = T.max(top[0], score[r, k])
                peak[r * SIDE + ty, tx] = top[0]
            for r in T.unroll(rows):
                shrink[r] = best[r]
                for j in T.unroll(SIDE):
                    best[r] = T.max(best[r], peak[r * SIDE + ty, j])
                shrink[r] = T.exp(shrink[r] - best[r])
                top[0] = T.float32(0)
                for k in T.unroll(KEYS // SIDE):
                    score[r, k] = T.exp(score[r, k] - best[r])  # hidden keys weigh 0
                    weight[r * SIDE + ty, k * SIDE + tx] = score[r, k]
                    top[0] += score[r, k]
                added[r * SIDE + ty, tx] = top[0]
            for r in T.unroll(rows):
                mass[r] = mass[r] * shrink[r]
                for j in T.unroll(SIDE):
                    mass[r] += added[r * SIDE + ty, j]
            for i in range(T.int64(KEYS * head_dim // threads)):
                chunk[i * threads + ty * SIDE + tx] = tiles.value_at(
                    tile,
                    kv_head,
                    (tiles.first_chunk(tile) + n) * KEYS
                    + (i * threads + ty * SIDE + tx) // head_dim,
                    (i * threads + ty * SIDE + tx) % head_dim,
                )
            for r, c in T.grid(rows, columns):
                acc[r, c] = acc[r, c] * shrink[r]
            for k in range(T.int64(KEYS)):
                for r in T.unroll(rows):
                    for c in T.unroll(columns):
                        acc[r, c] += weight[r * SIDE + ty, k] * chunk[k * head_dim + c * SIDE + tx]
        for r in T.unroll(rows):
            if tiles.kept(tile, r * SIDE + ty):
                for c in T.unroll(columns):
                    out[
                        tiles.token_of(tile, r * SIDE + ty),
                        tiles.head_of(kv_head, r * SIDE + ty) * head_dim + c * SIDE + tx,
                    ] = acc[r, c] / mass[r]

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for tile in T.thread_binding(tiles.count(), thread="blockIdx.y"):
            for kv_head in T.thread_binding(T.int64(tiles.kv_heads), thread="blockIdx.x"):
                for ty in T.thread_binding(T.int64(SIDE), thread="threadIdx.y"):
                    for tx in T.thread_binding(T.int64(SIDE), thread="threadIdx.x"):
                        attend(kv_head, tile, ty, tx)

    return body.body
