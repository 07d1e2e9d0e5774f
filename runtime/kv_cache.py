"""The KV cache: pages of keys and values, and the sequence that is computed.

What was computed stays in a tree of prefixes until its pages are needed, so that a sequence with
the same beginning computes only what is new. A sliding layer needs the window before the new
tokens: a sequence can go on wherever the window pages are still there. They stay longest where a
turn began or ended (`keep`).

An interrupt may come anywhere. The tree and the path of the running sequence say what is there, and
each change of them is a single assignment that makes true what was written before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import InputError
from .manifest import Manifest
from .pages import Pages
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

    def clear(self, array: Any, count: int) -> None:
        """Set the first `count` along axis 0 to zero."""


@dataclass(frozen=True)
class PageCounts:
    """Pages of the layers that see everything, and of the sliding layers."""

    full: int
    window: int

    def num_bytes(self, manifest: Manifest) -> int:
        """Of the keys and values of all layers."""
        counts = (self.full, self.window)
        sizes = [cache.num_bytes for cache in manifest.caches]
        return sum(counts[manifest.sliding[i // 2]] * size for i, size in enumerate(sizes))


def page_counts(
    manifest: Manifest,
    context: int,
    kv_memory: int | None = None,
    array_limit: int | None = None,
) -> PageCounts:
    """What `context` positions need, and room for kept points; or as many pages of both kinds, in
    that proportion, as fit into `kv_memory` bytes. No array of a layer takes more than
    `array_limit` bytes. Raises InputError if the context does not fit."""
    wanted, least = _counts_of_context(manifest, context)
    if kv_memory is not None:
        wanted = _counts_within(manifest, context, kv_memory, wanted, least)
    if array_limit is None:
        return wanted
    page = max(cache.num_bytes for cache in manifest.caches)
    most = array_limit // page
    if most < least.full:
        raise InputError(
            f"context: expected keys and values of a layer in at most {array_limit / 1e6:.0f} MB, "
            f"which the device allocates at once, found {least.full * page / 1e6:.0f} MB for "
            f"{context} positions; load with a smaller context"
        )
    return PageCounts(min(wanted.full, most), min(wanted.window, most))


def _counts_of_context(manifest: Manifest, context: int) -> tuple[PageCounts, PageCounts]:
    """What there is by default, and the least."""
    page = manifest.page_tokens
    full = -(-context // page) + 1  # one to copy to when a sequence leaves another
    if any(manifest.sliding):
        # so many positions may begin anywhere in a page
        running, point = ((manifest.window + n - 2) // page + 2 for n in (manifest.chunk, 0))
        least = PageCounts(full, min(full, running + 1))
        wanted = PageCounts(full, min(full, running + 1 + KEPT_POINTS * point))
    else:
        least = wanted = PageCounts(full, full)  # window pages cost nothing
    return wanted, least


def _counts_within(
    manifest: Manifest, context: int, kv_memory: int, wanted: PageCounts, least: PageCounts
) -> PageCounts:
    if kv_memory < least.num_bytes(manifest):
        raise InputError(
            f"kv_memory: expected at least {least.num_bytes(manifest)} bytes, which {context} "
            f"positions take, found {kv_memory}; load with a smaller context"
        )
    share = kv_memory / wanted.num_bytes(manifest)
    full = max(least.full, int(wanted.full * share))
    room = kv_memory - PageCounts(full, 0).num_bytes(manifest)
    if room < PageCounts(0, least.window).num_bytes(manifest):
        full, room = least.full, kv_memory - PageCounts(least.full, 0).num_bytes(manifest)
    each = PageCounts(0, 1).num_bytes(manifest)
    return PageCounts(full, min(full, room // each) if each else full)


class KVCache:
    """The arrays of every layer, in the order of the manifest, and what they hold."""

    def __init__(self, manifest: Manifest, memory: CacheMemory, counts: PageCounts) -> None:
        self._memory = memory
        self._window, self._page = manifest.window, manifest.page_tokens
        self._arrays: tuple[list[Any], list[Any]] = ([], [])  # by kind: full, window
        self.arrays = []
        for i, cache in enumerate(manifest.caches):
            sliding = manifest.sliding[i // 2]  # keys and values of each layer
            shape = ((counts.full, counts.window)[sliding], *cache.shape)
            self.arrays.append(memory.zeros(shape, cache.dtype))
            self._arrays[sliding].append(self.arrays[-1])
        # one more entry than pages: kernels may read keys of the next page, and ignore them
        entries = -(-manifest.context // self._page) + 1
        self.tables = [memory.zeros((entries,), "int32") for _ in (0, 1)]
        self._pages = Pages(counts.full, counts.window)
        self._root, self._time = new_root(), 0
        self._base = self._root  # what the running sequence hangs from
        self._path: list[Node] = []
        self._ahead: list[tuple[int, int]] = []  # pages of what is being written

    @property
    def length(self) -> int:
        """Positions of the running sequence that are written."""
        path = self._path
        return (len(path) - 1) * self._page + len(path[-1].tokens) if path else 0

    def reuse(self, tokens: Sequence[int]) -> int:
        """Begin a sequence with the longest prefix of `tokens` that can be gone on from; how many
        that is. The end of the sequence before is kept."""
        self.keep()
        self._leave()
        path, shared = match(self._root, tokens, self._page)
        shared = self._reachable(path, shared)
        whole, rest = divmod(shared, self._page)
        if rest:
            path[whole] = self._own(path[: whole + 1], rest)
        path = path[: whole + bool(rest)]
        self._time += 1
        for node in path:
            node.used = self._time
        self._write_tables(0, [(node.full, node.window or 0) for node in path])
        self._path = path
        return shared

    def start_apart(self) -> None:
        """Begin an empty sequence, of which nothing is kept."""
        self.keep()
        self._leave()
        self._base = new_root()

    def begin(self, count: int) -> int:
        """Make room for `count` more positions; the first of them."""
        start, have = self.length, len(self._path)
        missing = -(-(start + count) // self._page) - have
        self._ahead = []  # what an interrupt may have left
        if missing:
            seen = self._first_seen(start)
            taken = self._pages.take(missing, missing, self._root, self._path, seen)
            ahead = list(zip(*taken, strict=True))
            self._write_tables(have, ahead)
            self._ahead = ahead
        return start

    def append(self, tokens: Sequence[int]) -> None:
        """The tokens were written at the positions that `begin` made room for."""
        rest = tuple(tokens)
        while rest:
            last = self._path[-1] if self._path else self._base
            room = self._page - len(last.tokens) if self._path else 0
            if room:
                last.tokens += rest[:room]
                rest = rest[room:]
                continue
            full, window = self._ahead.pop(0)
            node = Node(last, rest[: self._page], full, window)
            node.used = self._time
            last.children.append(node)
            self._path.append(node)
            rest = rest[self._page :]

    def keep(self) -> None:
        """Keep this point, to go on from it later: the last token, too, can be another then."""
        self._time += 1
        first = self._first_seen(self.length - 1)
        for node in self._path[first:]:
            node.kept = self._time

    def pages_used(self) -> tuple[int, int]:
        """How many pages of each kind were ever written: the first ones."""
        full, window = self._pages.most_used
        return full, window

    def clear(self) -> None:
        """Forget everything, and set what was written to zero."""
        self._root = self._base = new_root()
        self._leave()
        for arrays, most_used in zip(self._arrays, self.pages_used(), strict=True):
            for array in arrays:
                self._memory.clear(array, most_used)

    def _first_seen(self, position: int) -> int:
        """The first page, of a sequence, in the window of a token at a position."""
        return max(0, position - self._window + 1) // self._page

    def _leave(self) -> None:
        """End the running sequence."""
        self._path, self._ahead, self._base = [], [], self._root
        self._pages.count(self._root, ())

    def _reachable(self, path: Sequence[Node], shared: int) -> int:
        """How many of `shared` tokens can be gone on from: the window before must be there."""
        while shared:
            first = self._first_seen(shared)
            last = (shared - 1) // self._page
            gaps = [i for i in range(first, last + 1) if path[i].window is None]
            if not gaps:
                break
            shared = gaps[-1] * self._page
        return shared

    def _own(self, path: Sequence[Node], count: int) -> Node:
        """A node with the first `count` tokens of the last of `path`, to go on from: itself if it
        has no more, else one with a copy of its pages."""
        node = path[-1]
        if len(node.tokens) == count:
            return node
        length = (len(path) - 1) * self._page + count
        seen = self._first_seen(length)
        (full,), (window,) = self._pages.take(1, 1, self._root, path, seen)
        assert node.window is not None and node.parent is not None
        for array in self._arrays[0]:
            self._memory.copy(array, node.full, full)
        for array in self._arrays[1]:
            self._memory.copy(array, node.window, window)
        copied = Node(node.parent, node.tokens[:count], full, window)
        node.parent.children.append(copied)
        return copied

    def _write_tables(self, start: int, pages: Sequence[tuple[int, int]]) -> None:
        """Tell kernels the pages of both kinds, from number `start` of the sequence on."""
        if pages:
            for table, numbers in zip(self.tables, zip(*pages, strict=True), strict=True):
                self._memory.write(table, np.array(numbers, np.int32), start)
