"""Which pages of the KV cache are free, and which are taken from old prefixes when none is."""

import heapq
from collections.abc import Collection, Sequence

from .prefix_tree import Node


class Pages:
    """The pages of both kinds of layers. What is taken is held by nodes, and by nothing else: free
    is what no node holds, so that a page which an interrupt lost on its way to a node is found
    again by the next count."""

    def __init__(self, num_full: int, num_window: int) -> None:
        self._counts = (num_full, num_window)
        self._free: tuple[list[int], list[int]] = ([], [])
        self.most_used = [0, 0]  # of each kind: pages from here on were never taken

    def count(self, root: Node, path: Sequence[Node]) -> None:
        """Find what is free: neither in the tree nor in the path of a running sequence."""
        nodes = [*root.below(), *path]
        held: tuple[set[int | None], ...]
        held = {node.full for node in nodes}, {node.window for node in nodes}
        full, window = (
            sorted(set(range(count)) - pages, reverse=True)  # the lowest is taken first
            for count, pages in zip(self._counts, held, strict=True)
        )
        self._free = full, window

    def take(
        self, num_full: int, num_window: int, root: Node, path: Sequence[Node], first_needed: int
    ) -> tuple[list[int], list[int]]:
        """Free pages, of old prefixes if no others are left: whole pages that end a prefix, and
        window pages of points that nobody kept first.

        `path`: the nodes of the running sequence, whose pages stay, but for the window pages before
        its node number `first_needed`.
        """
        if len(self._free[0]) < num_full or len(self._free[1]) < num_window:
            self.count(root, path)
            missing = [n - len(f) for n, f in zip((num_full, num_window), self._free, strict=True)]
            _drop_leaves(root, missing[0], {id(node) for node in path})
            needed = {id(node) for node in path[first_needed:]}
            _drop_windows(root, path, missing[1], needed)
            self.count(root, path)
        full, window = self._free
        taken = [full.pop() for _ in range(num_full)], [window.pop() for _ in range(num_window)]
        for kind in (0, 1):
            self.most_used[kind] = max(self.most_used[kind], *(p + 1 for p in taken[kind]), 0)
        return taken


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


def _drop_windows(root: Node, path: Sequence[Node], count: int, needed: Collection[int]) -> None:
    """Take `count` window pages from nodes, those that no kept point needs first."""
    nodes = {id(node): node for node in (*root.below(), *path)}
    having = [n for i, n in nodes.items() if n.window is not None and i not in needed]
    having.sort(key=lambda node: (node.kept, node.used))
    for node in having[: max(0, count)]:
        node.window = None
