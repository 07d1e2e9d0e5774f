"""Routing: which experts a token goes to, the tiles of tokens each expert serves, and the sum.

Loops are named as in `attention.py`: the iterations of `task` are independent.
"""

from functools import cache

from tvm import te
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..schedules.formats import Index, extent


@cache
def route(tiles: Index, tile: int, experts: int, top_k: int) -> PrimFunc:
    """logits [tiles, tile, experts] float32 -> the top_k experts of each token [tiles, tile, top_k]
    int32, best first, ties to the lower id; and their softmax [tiles, tile, top_k] float32."""
    n_tiles = extent(tiles)

    @T.prim_func(private=True, s_tir=True)
    def top_experts(
        logits: T.Buffer((n_tiles, T.int64(tile), T.int64(experts)), "float32"),
        ids: T.Buffer((n_tiles, T.int64(tile), T.int64(top_k)), "int32"),
        weights: T.Buffer((n_tiles, T.int64(tile), T.int64(top_k)), "float32"),
    ) -> None:
        T.func_attr({"op": "route", "tirx.noalias": True})
        for task in range(n_tiles):
            total = T.alloc_buffer((1,), "float32", scope="local")
            taken = T.alloc_buffer((1,), "int32", scope="local")
            best = T.alloc_buffer((1,), "int32", scope="local")
            for t in range(T.int64(tile)):
                for k in range(T.int64(top_k)):
                    best[0] = -1
                    for e in range(T.int64(experts)):
                        taken[0] = 0
                        for earlier in range(k):
                            if ids[task, t, earlier] == T.Cast("int32", e):
                                taken[0] = 1
                        if taken[0] == 0:
                            if best[0] < 0:
                                best[0] = T.Cast("int32", e)
                            else:
                                if logits[task, t, e] > logits[task, t, best[0]]:
                                    best[0] = T.Cast("int32", e)
                    ids[task, t, k] = best[0]
                total[0] = T.float32(0.0)
                for k in range(T.int64(top_k)):
                    weights[task, t, k] = T.exp(
                        logits[task, t, ids[task, t, k]] - logits[task, t, ids[task, t, 0]]
                    )
                    total[0] += weights[task, t, k]
                for k in range(T.int64(top_k)):
                    weights[task, t, k] = weights[task, t, k] / total[0]

    return top_experts


@cache
def sort_by_expert(tiles: Index, tile: int, experts: int, top_k: int) -> PrimFunc:
    """Sort (token, choice) pairs by expert into tiles of `tile` tokens with one expert each.

    ids [tiles, tile, top_k] int32 -> tile_expert [expert_tiles] int32, tile_token [expert_tiles,
    tile] int32, slots [tiles, tile, top_k] int32 (the pair's row among all expert_tiles * tile),
    and counters [2, experts] int32 that nobody reads. Free rows of a tile repeat token 0, free
    tiles repeat the last expert in use: both are computed and never read.
    """
    n_tiles = extent(tiles)
    n_expert_tiles = extent(num_expert_tiles(tiles, tile, experts, top_k))

    @T.prim_func(private=True, s_tir=True)
    def sort(
        ids: T.Buffer((n_tiles, T.int64(tile), T.int64(top_k)), "int32"),
        tile_expert: T.Buffer((n_expert_tiles,), "int32"),
        tile_token: T.Buffer((n_expert_tiles, T.int64(tile)), "int32"),
        slots: T.Buffer((n_tiles, T.int64(tile), T.int64(top_k)), "int32"),
        counters: T.Buffer((T.int64(2), T.int64(experts)), "int32"),
    ) -> None:
        T.func_attr({"op": "sort_by_expert", "tirx.noalias": True})
        used = T.alloc_buffer((2,), "int32", scope="local")
        for e in range(T.int64(experts)):
            counters[0, e] = 0
        for i, t, k in T.grid(n_tiles, T.int64(tile), T.int64(top_k)):
            counters[0, ids[i, t, k]] += 1
        used[0] = 0  # tiles
        used[1] = 0  # last expert in use
        for e in range(T.int64(experts)):
            counters[1, e] = used[0] * tile  # first row of expert e
            for i in range((counters[0, e] + (tile - 1)) // tile):
                tile_expert[used[0] + i] = T.Cast("int32", e)
            used[0] += (counters[0, e] + (tile - 1)) // tile
            if counters[0, e] > 0:
                used[1] = T.Cast("int32", e)
        for i in range(n_expert_tiles):
            if T.Cast("int32", i) >= used[0]:
                tile_expert[i] = used[1]
            for t in range(T.int64(tile)):
                tile_token[i, t] = 0
        for i, t, k in T.grid(n_tiles, T.int64(tile), T.int64(top_k)):
            slots[i, t, k] = counters[1, ids[i, t, k]]
            counters[1, ids[i, t, k]] += 1
            tile_token[slots[i, t, k] // tile, slots[i, t, k] % tile] = T.Cast(
                "int32", i * tile + t
            )

    return sort


def num_expert_tiles(tiles: Index, tile: int, experts: int, top_k: int) -> Index:
    """Tiles that are enough however the tokens choose: every expert may leave one part empty."""
    return (tiles * (tile * top_k) + experts * (tile - 1)) // tile


@cache
def combine_experts(
    tiles: Index, tile: int, hidden: int, expert_tiles: Index, top_k: int
) -> PrimFunc:
    """Expert outputs [expert_tiles, tile, hidden] float32, slots [tiles, tile, top_k] int32,
    weights [tiles, tile, top_k], residual [tiles, tile, hidden] float32 -> residual + the weighted
    sum of each token's experts [tiles, tile, hidden]."""
    shape = (extent(tiles), extent(tile), extent(hidden))
    y = te.placeholder((extent(expert_tiles), extent(tile), extent(hidden)), "float32", name="y")
    choices = (extent(tiles), extent(tile), extent(top_k))
    slots = te.placeholder(choices, "int32", name="slots")
    weights = te.placeholder(choices, "float32", name="weights")
    residual = te.placeholder(shape, "float32", name="residual")

    def total(i: Expr, t: Expr, h: Expr) -> Expr:
        sum_of = residual[i, t, h]
        for k in range(top_k):
            slot = slots[i, t, k]
            sum_of = sum_of + y[slot // tile, slot % tile, h] * weights[i, t, k]
        return sum_of

    out = te.compute(shape, total, name="out")
    function = te.create_prim_func([y, slots, weights, residual, out])
    return function.with_attr("op", "combine_experts")
