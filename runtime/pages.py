"""Which pages of the KV cache are free, and which are taken from old prefixes when none is."""

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .prefix_tree import Node


class NoPages(Exception):
    """Running sequences hold so many pages that fewer are left than are needed."""


@dataclass(frozen=True)
class Held:
    """What a running sequence has: the nodes of its path, whose pages stay, but for the window
    pages before node number `first_needed`; and the pages, full and window, of what is written."""

    path: Sequence[Node]
    first_needed: int
    ahead: Sequence[tuple[int, int]]


class Pages:
    """The pages of both kinds of layers. What is taken is held by nodes and running sequences, and
    by nothing else: free is what they do not hold, so that a page which an interrupt lost on its
    way to one is found again by the next count."""

    def __init__(self, num_full: int, num_window: int) -> None:
        self._counts = (num_full, num_window)
        self._free: tuple[list[int], list[int]] = ([], [])
        self.most_used = [0, 0]  # of each kind: pages from here on were never taken

    def count(self, root: Node, running: Sequence[Held]) -> None:
        """Find what is free: neither in the tree nor with a running sequence."""
        full: set[int | None] = set()
        window: set[int | None] = set()
        for held in running:
            full.update(page for page, _ in held.ahead)
            window.update(page for _, page in held.ahead)
        for node in _all_nodes(root, running):
            full.add(node.full)
            window.add(node.window)
        free_full, free_window = (
            sorted(set(range(count)) - pages, reverse=True)  # the lowest is taken first
            for count, pages in zip(self._counts, (full, window), strict=True)
        )
        self._free = free_full, free_window

    def free_again(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Free pages of both kinds that were taken before, by (first, how many)."""
        full, window = (
            _runs(page for page in free if page < most)
            for free, most in zip(self._free, self.most_used, strict=True)
        )
        return full, window

    def take(self, count: int, root: Node, running: Sequence[Held]) -> list[tuple[int, int]]:
        """Free pages of both kinds, of old prefixes if no others are left: whole pages that end a
        prefix, and window pages of points that nobody kept first. Raises NoPages, and takes
        nothing, if there are fewer."""
        if min(map(len, self._free)) < count:
            in_paths = {id(node) for held in running for node in held.path}
            self.count(root, running)
            _drop_leaves(root, count - len(self._free[0]), in_paths)
            self.count(root, running)  # what they had of the other kind is free now, too
            _drop_windows(root, running, count - len(self._free[1]))
            self.count(root, running)
        full, window = self._free
        if min(len(full), len(window)) < count:
            raise NoPages
        taken = [(full.pop(), window.pop()) for _ in range(count)]
        for kind in (0, 1):
            self.most_used[kind] = max(self.most_used[kind], *(page[kind] + 1 for page in taken))
        return taken


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Whole numbers, as (first, how many) of those that follow each other."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and sum(runs[-1]) == number:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return runs


def _all_nodes(root: Node, running: Sequence[Held]) -> Iterator[Node]:
    """Those of the tree, and those of sequences apart from it; some come several times."""
    yield from root.below()
    for held in running:
        yield from held.path


def _drop_leaves(root: Node, count: int, running: Collection[int]) -> None:
    """Remove `count` nodes, the least recently used first; never one that others continue."""
    leaves = [(n.used, i, n) for i, n in enumerate(root.below()) if not n.children]
    leaves = [entry for entry in leaves if id(entry[2]) not in running]
    heapq.heapify(leaves)
    order = len(leaves)
    while count > 0 and leaves:
        _, _, node = heapq.heappop(leaves)
        parent = node.parent
        assert parent is not None
        parent.children.remove(node)
        count -= 1
        if parent is not root and not parent.children and id(parent) not in running:
            order += 1
            heapq.heappush(leaves, (parent.used, -order, parent))


def _drop_windows(root: Node, running: Sequence[Held], count: int) -> None:
    """Take `count` window pages from nodes, those that no kept point needs first."""
    needed = {id(node) for held in running for node in held.path[held.first_needed :]}
    nodes = {id(node): node for node in _all_nodes(root, running)}
    having = [n for i, n in nodes.items() if n.window is not None and i not in needed]
    having.sort(key=lambda node: (node.kept, node.used))
    for node in having[: max(0, count)]:
        node.window = None
