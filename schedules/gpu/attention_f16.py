"""Attention of many tokens by matrix units that multiply float16: a work-group computes up to 128
rows, of which each warp has 16 or 32. A row is a query head of a token; all belong to the same KV
head.

It goes through the keys page by page, which pass through a ring of stages in shared memory. A page
is a chunk of the online softmax (`warp_rows.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc, Stmt

from ...targets import Target
from ..formats import const
from ..product import whole_parts
from ..records import Choose
from . import mma_f16, wgmma
from .mma import WARP
from .page_ring import ROW_NUMBERS, PageRing
from .tiles_bf16 import AT_ONCE
from .token_tiles import TokenTiles
from .warp_rows import Rows, WarpRows

ROWS = 128  # of a tile, at most
TOGETHER = (1, 2, 4, 8, 16)  # tokens of a tile
BANDS = (1, 2)  # of 16 rows, of a warp
STAGES = (2, 3, 4)
THREADS_AT_ONCE = 512  # with one band each, which takes 128 registers


def attention_f16(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule attention over float16 for any number of tokens on a target with such units;
    declines other kernels, and heads that do not fill rows of shared memory, or for whose pages it
    has no room."""
    if str(function.attrs["op"]) != "attention" or target.bf16_matrix != "wgmma":
        return None
    tiles = TokenTiles(function, 1, 1)
    fills = tiles.head_dim % ROW_NUMBERS == 0 and tiles.group <= ROWS
    if tiles.tiles is None or not fills or str(tiles.keys.dtype) != "float16":
        return None
    _, together = whole_parts(int(function.attrs["tile_rows"]), TOGETHER, ROWS // tiles.group)
    tiles = TokenTiles(function, together, tiles.per_page)
    bands = choose("bands", BANDS, 1)
    warps = -(-together * tiles.group // (bands * mma_f16.ROWS))
    ring = PageRing(tiles, 1, warps * WARP)
    room = target.shared_bytes // (ring.stage_words * 4)
    fitting = [n for n in STAGES if n <= room]
    if not fitting:
        return None
    ring = replace(ring, stages=choose("stages", fitting, max(fitting)))
    at_once = max(1, min(THREADS_AT_ONCE // bands // ring.threads, room // ring.stages))
    return Schedule(function.with_body(_body(WarpRows(tiles, ring, bands), at_once)))


@dataclass(frozen=True)
class Pages:
    """Which pages a tile sees, int32. They are kept in registers, because what is read from memory
    between copies would be read again each time."""

    first: Buffer  # of the sequence's pages
    count: Buffer
    listed: Buffer  # where the table has the first
    next: Buffer  # the page to copy next, as the cache counts
    whole: Buffer  # [2], from where and up to where, among those it sees, all rows see all keys


def _body(warp: WarpRows, at_once: int) -> Stmt:
    tiles, ring, threads = warp.tiles, warp.ring, warp.ring.threads
    attend = _attend(warp)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for number in T.thread_binding(tiles.count(), thread="blockIdx.y"):
            for kv_head in T.thread_binding(T.int64(tiles.kv_heads), thread="blockIdx.x"):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    shared = T.alloc_buffer(
                        (ring.stages * ring.stage_words,), "uint32", scope="shared.dyn"
                    )
                    with T.attr(T.int32(0), AT_ONCE, T.int32(at_once)):
                        attend(shared, kv_head, tiles.latest(number), thread)

    return body.body


def _attend(warp: WarpRows) -> Callable[..., object]:
    """Return statements that compute a tile."""
    tiles, bands, per_page = warp.tiles, warp.bands, warp.tiles.per_page
    find_pages, attend_pages = _find_pages(tiles), _attend_pages(warp)
    load, write = warp.load(), warp.write()

    @T.macro
    def attend_tile(rows, pages, shared, kv_head, tile, thread):  # type: ignore[no-untyped-def]
        find_pages(pages, tile)
        load(rows, kv_head, tile, thread)
        attend_pages(rows, pages, shared, kv_head, thread)
        write(rows, kv_head, tile, thread)

    @T.macro
    def attend(shared, kv_head, tile, thread):  # type: ignore[no-untyped-def]
        query = T.alloc_buffer((bands, tiles.head_dim // 16, 4), "uint32", scope="local")
        score = T.alloc_buffer((bands, per_page // 8, 4), "float32", scope="local")
        weight = T.alloc_buffer((bands, per_page // 16, 4), "uint32", scope="local")
        total = T.alloc_buffer((bands, tiles.head_dim // 8, 4), "float32", scope="local")
        last = T.alloc_buffer((bands, 2), "int32", scope="local")
        best = T.alloc_buffer((bands, 2), "float32", scope="local")
        mass = T.alloc_buffer((bands, 4), "float32", scope="local")
        exist = T.alloc_buffer((1,), "int32", scope="local")
        first = T.alloc_buffer((1,), "int32", scope="local")
        count = T.alloc_buffer((1,), "int32", scope="local")
        listed = T.alloc_buffer((1,), "int32", scope="local")
        number = T.alloc_buffer((1,), "int32", scope="local")
        whole = T.alloc_buffer((2,), "int32", scope="local")
        attend_tile(
            Rows(query, score, weight, total, last, best, mass, exist),
            Pages(first, count, listed, number, whole),
            shared,
            kv_head,
            tile,
            thread,
        )

    return attend  # type: ignore[no-any-return]


def _find_pages(tiles: TokenTiles) -> Callable[..., object]:
    """Return statements that find a tile's pages."""
    first_row, last_row = (const(r, "int64") for r in (0, tiles.together * tiles.group - 1))
    per_page = tiles.per_page

    def first_whole(tile: Expr) -> Expr:
        if tiles.window is None:
            return const(0, "int64")
        unseen = T.max(tiles.last_key(tile, last_row) - (tiles.window - 1), const(0, "int64"))
        return (unseen + (per_page - 1)) // per_page

    def end_whole(tile: Expr) -> Expr:
        return (tiles.last_key(tile, first_row) + 1) // per_page

    @T.macro
    def find_pages(pages, tile):  # type: ignore[no-untyped-def]
        pages.first[0] = tiles.first_chunk(tile).astype("int32")
        pages.count[0] = tiles.num_chunks(tile).astype("int32")
        pages.listed[0] = tiles.table(tile).astype("int32") + pages.first[0]
        pages.whole[0] = first_whole(tile).astype("int32") - pages.first[0]
        pages.whole[1] = end_whole(tile).astype("int32") - pages.first[0]
        pages.next[0] = tiles.tables[pages.listed[0]]

    return find_pages  # type: ignore[no-any-return]


def _attend_pages(warp: WarpRows) -> Callable[..., object]:
    """Return statements that go through a tile's pages."""
    per_page, ahead = warp.tiles.per_page, warp.ring.stages - 1
    copy_next, add_page = _copy_next(warp.ring), warp.add_page()
    wait = f"{wgmma.COPY_WAIT}<{ahead - 1}>"

    def some_hidden(pages: Pages, c: Expr) -> Expr:
        return T.Or(c < pages.whole[0], c >= pages.whole[1])

    @T.macro
    def attend_pages(rows, pages, shared, kv_head, thread):  # type: ignore[no-untyped-def]
        for c in T.unroll(ahead):
            copy_next(pages, shared, kv_head, c, thread)
        for c in range(pages.count[0]):
            T.evaluate(T.call_extern("void", wait))
            T.tvm_storage_sync("shared")  # from here, nobody reads the page before
            copy_next(pages, shared, kv_head, c + ahead, thread)
            if rows.exist[0] != 0:
                start = (pages.first[0] + c) * per_page
                add_page(rows, shared, c, start, some_hidden(pages, c), thread)

    return attend_pages  # type: ignore[no-any-return]


def _copy_next(ring: PageRing) -> Callable[..., object]:
    """Return statements that start the copies of a tile's page c, if there is one, and ask for the
    number of the page after it."""
    tables, copy = ring.tiles.tables, ring.copy()

    def page_after(pages: Pages, c: Expr) -> Expr:
        return tables[pages.listed[0] + T.min(const(1, "int32") + c, pages.count[0] - 1)]

    @T.macro
    def copy_next(pages, shared, kv_head, c, thread):  # type: ignore[no-untyped-def]
        if c < pages.count[0]:
            copy(shared, pages.next[0], kv_head, c, thread)
            pages.next[0] = page_after(pages, c)
        T.evaluate(T.call_extern("void", wgmma.COPY_COMMIT))

    return copy_next  # type: ignore[no-any-return]
