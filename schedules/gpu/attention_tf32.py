"""Attention of many tokens by matrix units that multiply parts of float32 (`tf32.py`): a work-group
computes 64 rows, 16 a warp. A row is a query head of a token; all belong to the same KV head.

It goes through the keys in chunks, which it unpacks into shared memory. Matrix units compute a
chunk's two products, scores = queries x keys and weights x values. Between them the softmax goes on
from chunk to chunk (online), with two threads a row. The softmax begins with the sink: a maximum
with mass 1 and no value.
"""

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..product import whole_parts
from ..records import Choose
from .mma import WARP, product
from .tf32 import DEPTH, MMA, rest, upper
from .token_tiles import HIDDEN, TokenTiles

ROWS = 64  # in a tile
MATRIX_ROWS, MATRIX_COLUMNS = 16, 8
THREADS = ROWS // MATRIX_ROWS * WARP
SHARERS = THREADS // ROWS  # threads that share a row of scores
KEYS = 32  # in a chunk
TOGETHER = (1, 2, 4, 8, 16)  # tokens of a tile
# Padding words after each row of the first and of the second factor: lanes use different banks.
FIRST_SKEW, SECOND_SKEW = 4, 8


def attention_tf32(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule attention over float16 on a target with such units; declines other kernels, and
    heads that do not fill matrices."""
    if str(function.attrs["op"]) != "attention" or target.matrix != "tf32":
        return None
    tiles = TokenTiles(function, 1, KEYS)
    fills = tiles.head_dim % MATRIX_COLUMNS == 0 and tiles.group <= ROWS
    if not fills or str(tiles.keys.dtype) != "float16":
        return None
    _, together = whole_parts(int(function.attrs["tile_rows"]), TOGETHER, ROWS // tiles.group)
    return Schedule(function.with_body(_body(function, together)))


def _body(function: PrimFunc, together: int) -> Stmt:
    tiles = TokenTiles(function, together, KEYS)
    queries, sinks, out, head_dim = tiles.queries, tiles.sinks, tiles.out, tiles.head_dim
    key_columns, value_columns = KEYS // MATRIX_COLUMNS, head_dim // MATRIX_COLUMNS

    def first_row(thread: Expr) -> Expr:
        return thread // WARP * MATRIX_ROWS + thread % WARP // 4

    def factor(rows: Buffer, thread: Expr, k: Expr, i: Expr) -> Expr:
        """Return a lane's i-th number of 16 rows and 8 columns of the first factor."""
        return rows[first_row(thread) + i % 2 * 8, k * DEPTH + thread % 4 + i // 2 * 4]

    def other(chunk: Buffer, stride: int, thread: Expr, k: Expr, n: Expr, i: int) -> Expr:
        """Return a lane's i-th number of the second factor, whose rows are `stride` apart."""
        at = (k * DEPTH + thread % 4 + i * 4) * stride
        return T.reinterpret(chunk[at + n * MATRIX_COLUMNS + thread % WARP // 4], dtype="uint32")

    @T.macro
    def multiply(sums, rows, chunk, thread, depth, columns, stride):  # type: ignore[no-untyped-def]
        parts = T.alloc_buffer((2, 4), "uint32", scope="local")
        for k in range(T.int64(depth // DEPTH)):
            for i in T.unroll(4):
                parts[0, i] = upper(factor(rows, thread, k, i))
                parts[1, i] = rest(factor(rows, thread, k, i))
            for n in T.unroll(columns):
                for part in T.unroll(2):
                    T.evaluate(
                        product(
                            MMA,
                            lambda i: sums[n, i],
                            lambda i: parts[part, i],
                            lambda i: other(chunk, stride, thread, k, n, i),
                        )
                    )

    @T.macro
    def attend(kv_head, tile, thread):  # type: ignore[no-untyped-def]
        query = T.alloc_buffer((ROWS, head_dim + FIRST_SKEW), "float32", scope="shared")
        chunk = T.alloc_buffer(
            (max(head_dim * (KEYS + SECOND_SKEW), KEYS * (head_dim + SECOND_SKEW)),),
            "float32",
            scope="shared",
        )
        weight = T.alloc_buffer((ROWS, KEYS + FIRST_SKEW), "float32", scope="shared")
        peak = T.alloc_buffer((ROWS, SHARERS), "float32", scope="shared")
        added = T.alloc_buffer((ROWS, SHARERS), "float32", scope="shared")
        shrink = T.alloc_buffer((ROWS,), "float32", scope="shared")
        row_mass = T.alloc_buffer((ROWS,), "float32", scope="shared")
        score = T.alloc_buffer((key_columns, 4), "float32", scope="local")
        acc = T.alloc_buffer((value_columns, 4), "float32", scope="local")
        own = T.alloc_buffer((KEYS // SHARERS,), "float32", scope="local")
        best = T.alloc_buffer((2,), "float32", scope="local")  # now and before, of the thread's row
        mass = T.alloc_buffer((1,), "float32", scope="local")
        top = T.alloc_buffer((1,), "float32", scope="local")
        for i in range(T.int64(ROWS * head_dim // THREADS)):
            query[(i * THREADS + thread) // head_dim, (i * THREADS + thread) % head_dim] = queries[
                tiles.token_of(tile, (i * THREADS + thread) // head_dim),
                tiles.head_of(kv_head, (i * THREADS + thread) // head_dim),
                (i * THREADS + thread) % head_dim,
            ]
        best[0] = sinks[tiles.head_of(kv_head, thread // SHARERS)]
        mass[0] = T.float32(1)
        for n, i in T.grid(value_columns, 4):
            acc[n, i] = T.float32(0)
        for c in range(tiles.num_chunks(tile)):
            for i in range(T.int64(KEYS * head_dim // THREADS)):
                chunk[
                    (i * THREADS + thread) // KEYS * (KEYS + SECOND_SKEW)
                    + (i * THREADS + thread) % KEYS
                ] = tiles.key_at(
                    tile,
                    kv_head,
                    (tiles.first_chunk(tile) + c) * KEYS + (i * THREADS + thread) % KEYS,
                    (i * THREADS + thread) // KEYS,
                )
            for n, i in T.grid(key_columns, 4):
                score[n, i] = T.float32(0)
            multiply(score, query, chunk, thread, head_dim, key_columns, KEYS + SECOND_SKEW)
            for n in T.unroll(key_columns):
                for i in T.unroll(4):
                    weight[
                        first_row(thread) + i // 2 * 8,
                        n * MATRIX_COLUMNS + thread % 4 * 2 + i % 2,
                    ] = score[n, i]
            top[0] = T.float32(HIDDEN)
            for k in T.unroll(KEYS // SHARERS):
                own[k] = T.Select(
                    tiles.visible(
                        tile,
                        thread // SHARERS,
                        (tiles.first_chunk(tile) + c) * KEYS + k * SHARERS + thread % SHARERS,
                    ),
                    weight[thread // SHARERS, k * SHARERS + thread % SHARERS],
                    T.float32(HIDDEN),
                )
                top[0] = T.max(top[0], own[k])
            peak[thread // SHARERS, thread % SHARERS] = top[0]
            best[1] = best[0]
            for i in T.unroll(SHARERS):
                best[0] = T.max(best[0], peak[thread // SHARERS, i])
            best[1] = T.exp(best[1] - best[0])
            top[0] = T.float32(0)
            for k in T.unroll(KEYS // SHARERS):
                own[k] = T.exp(own[k] - best[0])  # hidden keys weigh 0
                weight[thread // SHARERS, k * SHARERS + thread % SHARERS] = own[k]
                top[0] += own[k]
            added[thread // SHARERS, thread % SHARERS] = top[0]
            if thread % SHARERS == 0:
                shrink[thread // SHARERS] = best[1]
            for i in range(T.int64(KEYS * head_dim // THREADS)):
                chunk[
                    (i * THREADS + thread) // head_dim * (head_dim + SECOND_SKEW)
                    + (i * THREADS + thread) % head_dim
                ] = tiles.value_at(
                    tile,
                    kv_head,
                    (tiles.first_chunk(tile) + c) * KEYS + (i * THREADS + thread) // head_dim,
                    (i * THREADS + thread) % head_dim,
                )
            mass[0] = mass[0] * best[1]
            for i in T.unroll(SHARERS):
                mass[0] += added[thread // SHARERS, i]
            for n, i in T.grid(value_columns, 4):
                acc[n, i] = acc[n, i] * shrink[first_row(thread) + i // 2 * 8]
            multiply(acc, weight, chunk, thread, KEYS, value_columns, head_dim + SECOND_SKEW)
        if thread % SHARERS == 0:
            row_mass[thread // SHARERS] = mass[0]
        for i in T.unroll(4):
            if tiles.kept(tile, first_row(thread) + i // 2 * 8):
                for n in T.unroll(value_columns):
                    out[
                        tiles.token_of(tile, first_row(thread) + i // 2 * 8),
                        tiles.head_of(kv_head, first_row(thread) + i // 2 * 8) * head_dim
                        + n * MATRIX_COLUMNS
                        + thread % 4 * 2
                        + i % 2,
                    ] = acc[n, i] / row_mass[first_row(thread) + i // 2 * 8]

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for tile in T.thread_binding(tiles.count(), thread="blockIdx.y"):
            for kv_head in T.thread_binding(T.int64(tiles.kv_heads), thread="blockIdx.x"):
                for thread in T.thread_binding(T.int64(THREADS), thread="threadIdx.x"):
                    attend(kv_head, tile, thread)

    return body.body
