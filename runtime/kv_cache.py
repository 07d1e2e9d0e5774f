"""The KV cache: pages of keys and values, and the sequences that are computed.

What was computed stays in a tree of prefixes until its pages are needed, so that a sequence with
the same beginning computes only what is new. A sliding layer needs the window before the new
tokens: a sequence can go on wherever the window pages are still there. They stay longest where a
turn began or ended (`keep`).

An interrupt may come anywhere. The tree and the paths of the running sequences say what is there,
and each change of them is a single assignment that makes true what was written before.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import InputError
from .manifest import Manifest
from .pages import Held, Pages
from .prefix_tree import Node, match, new_root

KEYS_PER_TILE = 16  # of a page: keys are [heads, tiles, dim, 16], values [heads, positions, dim]
PAGE_TOKENS = 64  # positions of a page, of what is compiled now
KEPT_POINTS = 16  # whose window pages there is room for, beside the running sequence's


class CacheMemory(Protocol):
    """What a device does with the arrays of the cache, which lie in its memory."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any: ...

    def write(self, array: Any, part: np.ndarray, start: int = 0) -> None:
        """Set elements along axis 0, from `start` on."""

    def copy(self, array: Any, source: int, target: int) -> None:
        """Set one element along axis 0 to what another is."""

    def clear(self, array: Any, count: int, start: int = 0) -> None:
        """Set `count` elements along axis 0 to zero, from `start` on."""


@dataclass(frozen=True)
class PageCounts:
    """Pages of the layers that see everything, and of the sliding layers."""

    full: int
    window: int

    def num_bytes(self, manifest: Manifest) -> int:
        """Bytes of the keys and values of all layers."""
        counts = (self.full, self.window)
        sizes = [cache.num_bytes for cache in manifest.caches]
        return sum(counts[manifest.sliding[i // 2]] * size for i, size in enumerate(sizes))


def page_counts(
    manifest: Manifest,
    context: int,
    kv_memory: int | None = None,
    array_limit: int | None = None,
    sequences: int = 1,
) -> PageCounts:
    """What `context` positions of all `sequences` together need, and room for kept points; or as
    many pages of both kinds, in that proportion, as fit into `kv_memory` bytes. No array of a layer
    takes more than `array_limit` bytes. Raises InputError if the context does not fit."""
    wanted, least = _counts_of_context(manifest, context, sequences)
    if kv_memory is not None:
        wanted = _counts_within(manifest, context, kv_memory, wanted, least)
    if array_limit is None:
        return wanted
    page = max(cache.num_bytes for cache in manifest.caches)
    most = array_limit // page
    if most < least.full:
        raise InputError(
            f"context: expected keys and values of a layer in at most {array_limit:,} bytes, "
            f"which the device allocates at once, found {least.full * page:,} for "
            f"{context} positions; load with a smaller context"
        )
    return PageCounts(min(wanted.full, most), min(wanted.window, most))


def _counts_of_context(
    manifest: Manifest, context: int, sequences: int
) -> tuple[PageCounts, PageCounts]:
    """What there is by default, and the least, with which one sequence can go on."""
    page = manifest.page_tokens
    full = -(-context // page) + 1  # one to copy to when a sequence leaves another
    if any(manifest.sliding):
        # so many positions may begin anywhere in a page
        running, point = ((manifest.window + n - 2) // page + 2 for n in (manifest.chunk, 0))
        least = PageCounts(full, min(full, running + 1))
        wanted = PageCounts(full, min(full, running + (sequences - 1 + KEPT_POINTS) * point + 1))
    else:
        least = wanted = PageCounts(full, full)  # window pages cost nothing
    return wanted, least


def _counts_within(
    manifest: Manifest, context: int, kv_memory: int, wanted: PageCounts, least: PageCounts
) -> PageCounts:
    if kv_memory < least.num_bytes(manifest):
        raise InputError(
            f"kv_memory: expected at least {least.num_bytes(manifest)} bytes "
            f"({least.num_bytes(manifest) / 1e9:.3g} GB), which {context} positions take, found "
            f"{kv_memory}; load with a smaller context"
        )
    full = max(least.full, wanted.full * kv_memory // wanted.num_bytes(manifest))
    room = kv_memory - PageCounts(full, 0).num_bytes(manifest)
    if room < PageCounts(0, least.window).num_bytes(manifest):
        full, room = least.full, kv_memory - PageCounts(least.full, 0).num_bytes(manifest)
    each = PageCounts(0, 1).num_bytes(manifest)
    return PageCounts(full, min(full, room // each) if each else full)


class KVCache:
    """The arrays of every layer, in the order of the manifest, and what they hold. At most
    `sequences` run at once."""

    def __init__(
        self, manifest: Manifest, memory: CacheMemory, counts: PageCounts, sequences: int = 1
    ) -> None:
        self._memory = memory
        self.window, self.page_tokens = manifest.window, manifest.page_tokens
        self._arrays: tuple[list[Any], list[Any]] = ([], [])  # by kind: full, window
        self.arrays = []
        for i, cache in enumerate(manifest.caches):
            sliding = manifest.sliding[i // 2]  # keys and values of each layer
            shape = ((counts.full, counts.window)[sliding], *cache.shape)
            self.arrays.append(memory.zeros(shape, cache.dtype))
            self._arrays[sliding].append(self.arrays[-1])
        # one more entry than pages: kernels may read keys of the next page, and ignore them
        entries = -(-manifest.context // self.page_tokens) + 1
        self.tables = [memory.zeros((sequences * entries,), "int32") for _ in (0, 1)]
        self._starts = range(0, sequences * entries, entries)  # of the tables of sequences
        self._pages = Pages(counts.full, counts.window)
        self.root, self._time = new_root(), 0
        self.running: tuple[CachedSequence, ...] = ()

    def start(self) -> "CachedSequence":
        """A sequence without tokens, which runs until it is left."""
        used = {sequence.table for sequence in self.running}
        sequence = CachedSequence(self, next(start for start in self._starts if start not in used))
        self.running = (*self.running, sequence)
        return sequence

    def leave(self, sequence: "CachedSequence") -> None:
        """End a sequence. What the tree has of it stays there until its pages are needed."""
        self.running = tuple(other for other in self.running if other is not sequence)
        self._count()

    def take(self, count: int, sequence: "CachedSequence", held: Held) -> list[tuple[int, int]]:
        """Pages of both kinds for a sequence, which holds `held`. Raises NoPages."""
        others = [other for other in self.running if other is not sequence]
        everything = [held, *(other.held() for other in others)]
        return self._pages.take(count, self.root, everything)

    def copy_page(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        """Copy a page of each kind."""
        for arrays, from_page, to_page in zip(self._arrays, source, target, strict=True):
            for array in arrays:
                self._memory.copy(array, from_page, to_page)

    def write_table(self, start: int, pages: Sequence[tuple[int, int]]) -> None:
        """Tell kernels the pages of both kinds, from entry `start` of the tables on."""
        if pages:
            for table, numbers in zip(self.tables, zip(*pages, strict=True), strict=True):
                self._memory.write(table, np.array(numbers, np.int32), start)

    def now(self) -> int:
        """A time later than any before."""
        self._time += 1
        return self._time

    def pages_used(self) -> tuple[int, int]:
        """How many pages of each kind were ever written: the first ones."""
        full, window = self._pages.most_used
        return full, window

    def clear(self) -> None:
        """Forget everything, and set what was written to zero; running sequences are empty then."""
        self.root = new_root()
        for sequence in self.running:
            sequence.restart()
        self._count()
        for arrays, most_used in zip(self._arrays, self.pages_used(), strict=True):
            for array in arrays:
                self._memory.clear(array, most_used)

    def drop(self, sequence: "CachedSequence") -> None:
        """Forget what a sequence holds that gave no numbers, but for what other running sequences
        hold: they tell themselves whether that is right. Its pages are set to zero, because kernels
        multiply by zero what they do not use. It is empty then."""
        others = {id(n) for other in self.running if other is not sequence for n in other.path}
        spoiled = next((node for node in sequence.path if id(node) not in others), None)
        if spoiled is not None:
            assert spoiled.parent is not None
            spoiled.parent.children.remove(spoiled)  # and all that goes on from there
        sequence.restart()
        self._count()
        for arrays, pages in zip(self._arrays, self._pages.free_again(), strict=True):
            for start, count in pages:
                for array in arrays:
                    self._memory.clear(array, count, start)

    def _count(self) -> None:
        self._pages.count(self.root, [sequence.held() for sequence in self.running])


class CachedSequence:
    """What one sequence has in the cache: a path of nodes in the tree, or apart from it."""

    def __init__(self, cache: KVCache, table: int) -> None:
        self._cache: KVCache = weakref.proxy(cache)  # which knows those that run
        self._page = cache.page_tokens
        self.table = table  # where its table begins
        self._base = cache.root  # what its path hangs from
        self._path: list[Node] = []
        self._ahead: list[tuple[int, int]] = []  # pages of what is being written
        self._ready: tuple[int, int] | None = None  # after so many pages, that those are there

    @property
    def path(self) -> Sequence[Node]:
        """The nodes that it has, from the beginning on."""
        return self._path

    @property
    def length(self) -> int:
        """Positions that are written."""
        path = self._path
        return (len(path) - 1) * self._page + len(path[-1].tokens) if path else 0

    def held(self) -> Held:
        """The pages that nobody else may have."""
        return Held(self._path, self._first_seen(self.length), self._ahead)

    def reuse(self, tokens: Sequence[int]) -> int:
        """Begin again with the longest prefix of `tokens` that can be gone on from; how many that
        is. The end of what was there before is kept."""
        self.keep()
        self.restart()
        path, shared = match(self._cache.root, tokens, self._page)
        shared = self._reachable(path, shared)
        whole, rest = divmod(shared, self._page)
        if rest:
            path[whole] = self._own(path[: whole + 1], rest)
        path = path[: whole + bool(rest)]
        time = self._cache.now()
        for node in path:
            node.used = time
        self._cache.write_table(self.table, [(node.full, node.window or 0) for node in path])
        self._path = path
        return shared

    def start_apart(self) -> None:
        """Begin again without tokens; nothing of what comes is kept."""
        self.keep()
        self.restart()
        self._base = new_root()

    def restart(self) -> None:
        """Begin again without tokens."""
        self._path, self._ahead, self._ready, self._base = [], [], None, self._cache.root

    def begin(self, count: int) -> int:
        """Make room for `count` more positions; the first of them. Raises NoPages."""
        start, have = self.length, len(self._path)
        missing = -(-(start + count) // self._page) - have
        if self._ready == (have, missing):  # there is room already
            return start
        self._ahead, self._ready = [], None  # what an interrupt may have left
        if missing:
            ahead = self._cache.take(missing, self, self.held())
            self._cache.write_table(self.table + have, ahead)
            self._ahead = ahead
        self._ready = have, missing
        return start

    def append(self, tokens: Sequence[int]) -> None:
        """The tokens were written at the positions that `begin` made room for."""
        self._ready = None
        rest, time = tuple(tokens), self._cache.now()
        while rest:
            last = self._path[-1] if self._path else self._base
            room = self._page - len(last.tokens) if self._path else 0
            if room:
                last.tokens += rest[:room]
                rest = rest[room:]
            else:
                full, window = self._ahead.pop(0)
                node = Node(last, rest[: self._page], full, window)
                node.used = time
                last.children.append(node)
                self._path.append(node)
                rest = rest[self._page :]
            if len(self._path[-1].tokens) == self._page:
                self._unite(self._path[-1])

    def keep(self) -> None:
        """Keep this point, to go on from it later: the last token, too, can be another then."""
        time = self._cache.now()
        for node in self._path[self._first_seen(self.length - 1) :]:
            node.kept = time

    def _unite(self, node: Node) -> None:
        """Go on from the node that has the same tokens as this one, whose page is full now, if
        there is one: the tree would find only one of the two. It takes the window page if its own
        is gone, which is why these tokens were computed again."""
        assert node.parent is not None
        same = next((n for n in node.parent.children if n.tokens == node.tokens), node)
        if same is node:
            return
        node.parent.children.remove(node)
        if same.window is None:
            same.window = node.window
        same.used = node.used
        number = len(self._path) - 1
        assert same.window is not None
        self._cache.write_table(self.table + number, [(same.full, same.window)])
        self._path[number] = same

    def writes(self, node: Node) -> bool:
        """Whether the next tokens go to this node."""
        return bool(self._path) and self._path[-1] is node

    def _first_seen(self, position: int) -> int:
        """The first page in the window of a token at a position."""
        return max(0, position - self._cache.window + 1) // self._page

    def _reachable(self, path: list[Node], shared: int) -> int:
        """How many of `shared` tokens can be gone on from: the window before must be there."""
        while shared:
            first = self._first_seen(shared)
            last = (shared - 1) // self._page
            gaps = [i for i in range(first, last + 1) if path[i].window is None]
            if not gaps:
                break
            shared = gaps[-1] * self._page
        return shared

    def _own(self, path: list[Node], count: int) -> Node:
        """A node with the first `count` tokens of the last of `path`, to go on from: itself if it
        has no more and no other sequence writes there, else one with a copy of its pages."""
        node = path[-1]
        if len(node.tokens) == count and not any(s.writes(node) for s in self._cache.running):
            return node
        length = (len(path) - 1) * self._page + count
        held = Held(path, self._first_seen(length), [])
        ((full, window),) = self._cache.take(1, self, held)
        assert node.window is not None and node.parent is not None
        self._cache.copy_page((node.full, node.window), (full, window))
        copied = Node(node.parent, node.tokens[:count], full, window)
        node.parent.children.append(copied)
        return copied
