"""Attention of a few tokens over the KV cache: a work-group serves all query heads of a token and a
KV head, or some of these heads.

Its subgroups take chunks of keys by turns, each with an online softmax of its own. A chunk has as
many keys as a subgroup has threads: a thread has one key of it while scores are computed, and some
elements of the output while values are added up. The softmax begins with the sink: a maximum with
mass 1 and no value. In a layer without a window several work-groups share the context, and a second
kernel merges their results.

A kernel for one token that also rotates, extends the cache and quantises (`step_tiles.py`) computes
the token's own key and value where it needs them; of these layers with a window, each query head
has a work-group of its own.
"""

import functools
import math
from typing import Any

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..formats import const, is_few
from ..product import whole_parts
from ..records import Choose
from .reduce import num_slices, reduction
from .step_tiles import STEP_OP, StepTiles
from .token_tiles import HIDDEN, TokenTiles

SUBGROUPS = (1, 2, 4, 8)  # in a work-group
SHARED_BYTES = 30 << 10  # for a work-group, at most: every GPU has 32 KiB
PARTS = (1, 2, 4, 8, 16, 32, 64)  # of a context without a window
PARTS_WANTED = 16
LOADS_TOGETHER = (8, 16, 32)  # by a thread, so that they hide each other's latency
LOADS_WANTED = 16
LOADS_WANTED_OF_ONE = 32  # where a thread serves one query head, and has registers left


def attention_one(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule attention of a few tokens; declines other kernels, and groups of more query heads
    than a subgroup has threads or shared memory for."""
    op = str(function.attrs["op"])
    if op.startswith(STEP_OP):
        tiles: TokenTiles = StepTiles(function, target.subgroup_size)
    elif op == "attention" and is_few(function.params[0].shape[0]):
        tiles = TokenTiles(function, 1, target.subgroup_size)
    else:
        return None
    group = _heads_together(tiles)
    fitting = _fitting(tiles, group, target)
    if group > target.subgroup_size or not fitting:
        return None
    members = choose("subgroups", fitting, max(fitting))
    return Schedule(function.with_body(_body(tiles, group, members, target, choose)))


def _heads_together(tiles: TokenTiles) -> int:
    """Return the query heads of a work-group: all of a KV head; one where it reads little."""
    return 1 if isinstance(tiles, StepTiles) and tiles.window is not None else tiles.group


def _fitting(tiles: TokenTiles, group: int, target: Target) -> list[int]:
    """Return the numbers of subgroups that a work-group may have, and has shared memory for."""
    threads, row_bytes = target.subgroup_size, 4 * group
    each = row_bytes * (threads + tiles.head_dim + 2) + 4 * threads
    most = min(target.max_threads // threads, (SHARED_BYTES - row_bytes * tiles.head_dim) // each)
    return [n for n in SUBGROUPS if n <= most]


def _body(tiles: TokenTiles, group: int, members: int, target: Target, choose: Choose) -> Stmt:
    """`group`: query heads of a work-group."""
    only, num_tokens = const(0, "int64"), tiles.num_tokens  # a tile has one row
    sinks, heads, head_dim, threads = tiles.sinks, tiles.heads, tiles.head_dim, target.subgroup_size
    step: Any = tiles if isinstance(tiles, StepTiles) else None
    dtype = str(tiles.keys.dtype)
    append: Any = step.append() if step is not None else None
    each = -(-head_dim // threads)  # elements of the output that a thread has
    parts = 1 if tiles.window is not None else choose("parts", PARTS, PARTS_WANTED)
    wanted = LOADS_WANTED_OF_ONE if group == 1 else LOADS_WANTED
    loads = math.gcd(head_dim, threads * each)
    at_once = choose("loads_together", *whole_parts(loads, LOADS_TOGETHER, wanted))
    size, slices = members * threads, num_slices(threads, group)
    find_largest = reduction(T.max, threads, group, target)
    add_up = reduction(lambda x, y: x + y, threads, group, target)
    write = tiles.keep()

    def first_chunk(token: Expr, part: Expr) -> Expr:
        """Return where a part begins; the parts share the visible chunks evenly."""
        return tiles.first_chunk(token) + tiles.num_chunks(token) * part // parts

    def turns(token: Expr, part: Expr) -> Expr:
        chunks = first_chunk(token, part + 1) - first_chunk(token, part)
        return (chunks + (members - 1)) // members

    def first_key(token: Expr, part: Expr, turn: Expr, member: Expr) -> Expr:
        return (first_chunk(token, part) + turn * members + member) * threads

    def visible(token: Expr, part: Expr, key: Expr) -> Expr:
        """Whether the token sees the key, and the key is not the next part's."""
        return T.And(tiles.visible(token, only, key), key < first_chunk(token, part + 1) * threads)

    def there(token: Expr, key: Expr) -> Expr:
        """Return a key in the cache: subgroups past the last chunk read the last key in vain."""
        return T.min(key, tiles.last_key(token, only))

    def value_at(token: Expr, kv_head: Expr, key: Expr, thread: Expr, i: Expr) -> Expr:
        """Return a thread's i-th element; threads past the last repeat it, and do not keep it."""
        d = T.min(thread * each + i, const(head_dim - 1, "int64"))
        return tiles.value_at(token, kv_head, there(token, key), d)

    def begins(part: Expr, member: Expr) -> Expr:
        """Whether a subgroup adds the sink, and the own key: only the first one does."""
        return T.And(part == 0, member == 0)

    @T.macro
    def extend(own, token, first_head, part, member, thread):  # type: ignore[no-untyped-def]
        """Compute the token's own key and value; one subgroup of a KV head's writes them."""
        for i in T.unroll(each):
            own[0, i] = step.own_key(token, first_head // tiles.group, thread * each + i)
            own[1, i] = step.own_value(token, first_head // tiles.group, thread * each + i)
            if T.And(begins(part, member), first_head % tiles.group == 0):
                append(own[0, i], own[1, i], token, first_head // tiles.group, thread * each + i)

    @T.macro
    def add_own(own, query, best, mass, acc, score, top, weight, some, part, member, thread):  # type: ignore[no-untyped-def]
        """Let the softmax that begins with the sink go on with the token's own key."""
        for g in T.unroll(group):
            score[g] = T.float32(0)
            for i in T.unroll(each):
                score[g] += query[thread * each + i, g] * T.Cast("float32", own[0, i])
        add_up(score, top, weight, some, member, thread)
        if begins(part, member):
            for g in T.unroll(group):
                score[g] = T.max(best[g], top[g])
                mass[g] = mass[g] * T.exp(best[g] - score[g]) + T.Select(
                    thread == 0, T.exp(top[g] - score[g]), T.float32(0)
                )
                for i in T.unroll(each):
                    acc[g, i] = T.exp(top[g] - score[g]) * T.Cast("float32", own[1, i])
                best[g] = score[g]

    def largest_of(largest: Buffer, first: Expr, count: int, at: Expr) -> Expr:
        return functools.reduce(T.max, (largest[first + i, at] for i in range(count)))

    @T.macro
    def merge(merged, first, count, best, mass, acc, at, d):  # type: ignore[no-untyped-def]
        """Set `merged` to the sum, the mass and the maximum of `count` softmaxes together."""
        merged[2] = largest_of(best, first, count, at)
        merged[0] = T.float32(0)
        merged[1] = T.float32(0)
        for i in T.unroll(count):
            merged[0] += acc[first + i, at, d] * T.exp(best[first + i, at] - merged[2])
            merged[1] += mass[first + i, at] * T.exp(best[first + i, at] - merged[2])

    @T.macro
    def finish(merged, token, head, d):  # type: ignore[no-untyped-def]
        kept = T.alloc_buffer((1,), "float32", scope="local")
        greatest = T.alloc_buffer((1,), "uint32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        whole = T.alloc_buffer((1,), "int32", scope="local")
        write(merged[0] / merged[1], token, head, d, kept, greatest, scale, whole)

    @T.macro
    def keep(partial, largest, total, merged, token, part, head, d):  # type: ignore[no-untyped-def]
        if parts == 1:
            finish(merged, token, head, d)
        else:
            partial[token * parts + part, head, d] = merged[0]
            if d == 0:
                largest[token * parts + part, head] = merged[2]
                total[token * parts + part, head] = merged[1]

    @T.macro
    def attend(partial, largest, total, token, first_head, part, member, thread):  # type: ignore[no-untyped-def]
        own = T.alloc_buffer((2, each), dtype, scope="local")  # a thread's of the token's own
        query = T.alloc_buffer((head_dim, group), "float32", scope="shared")
        weight = T.alloc_buffer((members, threads, group), "float32", scope="shared")
        some = T.alloc_buffer((members, slices, group), "float32", scope="shared")
        members_best = T.alloc_buffer((members, group), "float32", scope="shared")
        members_mass = T.alloc_buffer((members, group), "float32", scope="shared")
        members_acc = T.alloc_buffer((members, group, head_dim), "float32", scope="shared")
        score = T.alloc_buffer((group,), "float32", scope="local")
        top = T.alloc_buffer((group,), "float32", scope="local")
        best = T.alloc_buffer((group,), "float32", scope="local")  # the same in all threads
        mass = T.alloc_buffer((group,), "float32", scope="local")  # over a thread's keys
        acc = T.alloc_buffer((group, each), "float32", scope="local")
        loaded = T.alloc_buffer((at_once,), "float32", scope="local")
        merged = T.alloc_buffer((3,), "float32", scope="local")
        if step is not None:
            extend(own, token, first_head, part, member, thread)
        for i in range(T.int64(-(-group * head_dim // size))):
            if i * size + member * threads + thread < group * head_dim:
                query[
                    (i * size + member * threads + thread) % head_dim,
                    (i * size + member * threads + thread) // head_dim,
                ] = tiles.query_at(
                    token,
                    first_head + (i * size + member * threads + thread) // head_dim,
                    (i * size + member * threads + thread) % head_dim,
                )
        for g in T.unroll(group):
            best[g] = T.if_then_else(begins(part, member), sinks[first_head + g], T.float32(HIDDEN))
            mass[g] = T.Select(T.And(begins(part, member), thread == 0), T.float32(1), T.float32(0))
            for i in T.unroll(each):
                acc[g, i] = T.float32(0)
        if step is not None:
            add_own(own, query, best, mass, acc, score, top, weight, some, part, member, thread)
        for turn in range(turns(token, part)):
            for g in T.unroll(group):
                score[g] = T.float32(0)
            for batch in range(T.int64(head_dim // at_once)):
                for d in T.unroll(at_once):
                    loaded[d] = tiles.key_at(
                        token,
                        first_head // tiles.group,
                        there(token, first_key(token, part, turn, member) + thread),
                        batch * at_once + d,
                    )
                for d in T.unroll(at_once):
                    for g in T.unroll(group):
                        score[g] += query[batch * at_once + d, g] * loaded[d]
            for g in T.unroll(group):
                score[g] = T.Select(
                    visible(token, part, first_key(token, part, turn, member) + thread),
                    score[g],
                    T.float32(HIDDEN),
                )
            find_largest(score, top, weight, some, member, thread)
            for g in T.unroll(group):
                top[g] = T.max(top[g], best[g])
                best[g] = T.exp(best[g] - top[g])
                mass[g] = mass[g] * best[g]
                for i in T.unroll(each):
                    acc[g, i] = acc[g, i] * best[g]
                best[g] = top[g]
                score[g] = T.Select(
                    score[g] > T.float32(HIDDEN / 2), T.exp(score[g] - best[g]), T.float32(0)
                )
                mass[g] += score[g]
                weight[member, thread, g] = score[g]
            for batch in range(T.int64(threads * each // at_once)):
                for j in T.unroll(at_once):
                    loaded[j] = value_at(
                        token,
                        first_head // tiles.group,
                        first_key(token, part, turn, member) + (batch * at_once + j) // each,
                        thread,
                        (batch * at_once + j) % each,
                    )
                for j in T.unroll(at_once):
                    for g in T.unroll(group):
                        acc[g, j % each] += (
                            weight[member, (batch * at_once + j) // each, g] * loaded[j]
                        )
        add_up(mass, top, weight, some, member, thread)
        for g in T.unroll(group):
            if thread == 0:
                members_best[member, g] = best[g]
                members_mass[member, g] = top[g]
            for i in T.unroll(each):
                if thread * each + i < head_dim:
                    members_acc[member, g, thread * each + i] = acc[g, i]
        for i in range(T.int64(-(-group * head_dim // size))):
            if i * size + member * threads + thread < group * head_dim:
                merge(
                    merged,
                    T.int64(0),
                    members,
                    members_best,
                    members_mass,
                    members_acc,
                    (i * size + member * threads + thread) // head_dim,
                    (i * size + member * threads + thread) % head_dim,
                )
                keep(
                    partial,
                    largest,
                    total,
                    merged,
                    token,
                    part,
                    first_head + (i * size + member * threads + thread) // head_dim,
                    (i * size + member * threads + thread) % head_dim,
                )

    if parts == 1:

        @T.prim_func(private=True, s_tir=True, check_well_formed=False)
        def in_one() -> None:
            for token in T.thread_binding(num_tokens, thread="blockIdx.z"):
                for some in T.thread_binding(T.int64(heads // group), thread="blockIdx.x"):
                    for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                        for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                            attend(
                                sinks, sinks, sinks, token, some * group, T.int64(0), member, thread
                            )

        return in_one.body

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def in_parts() -> None:
        partial = T.alloc_buffer((num_tokens * parts, heads, head_dim), "float32")
        largest = T.alloc_buffer((num_tokens * parts, heads), "float32")
        total = T.alloc_buffer((num_tokens * parts, heads), "float32")
        for token in T.thread_binding(num_tokens, thread="blockIdx.z"):
            for some in T.thread_binding(T.int64(heads // group), thread="blockIdx.x"):
                for part in T.thread_binding(T.int64(parts), thread="blockIdx.y"):
                    for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                        for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                            attend(
                                partial, largest, total, token, some * group, part, member, thread
                            )
        for token in T.thread_binding(num_tokens, thread="blockIdx.y"):
            for head in T.thread_binding(T.int64(heads), thread="blockIdx.x"):
                for d in T.thread_binding(T.int64(head_dim), thread="threadIdx.x"):
                    merged = T.alloc_buffer((3,), "float32", scope="local")
                    merge(merged, token * parts, parts, largest, total, partial, head, d)
                    finish(merged, token, head, d)

    return in_parts.body
