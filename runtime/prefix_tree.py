"""A tree of token prefixes: which pages of the KV cache hold the keys and values of which tokens.

A node is a page: the tokens at its positions, after those of the nodes above it. Only a node whose
page is full has children, so that a sequence that leaves another within a page has a page of its
own. A full page is never written again.
"""

from collections.abc import Iterator, Sequence


class Node:
    """A page of the layers that see everything, `full`, and one of the sliding layers, `window`,
    until that is needed for others. `used` and `kept` are times: when a sequence last went through,
    and when a point to go on from was last kept that needs the window page; 0 if none was."""

    __slots__ = ("children", "full", "kept", "parent", "tokens", "used", "window")

    def __init__(
        self, parent: "Node | None", tokens: tuple[int, ...], full: int, window: int | None
    ) -> None:
        self.parent, self.tokens, self.full, self.window = parent, tokens, full, window
        self.children: list[Node] = []
        self.used = self.kept = 0

    def below(self) -> Iterator["Node"]:
        """All nodes under this one, each after its parent."""
        nodes = list(self.children)
        while nodes:
            node = nodes.pop()
            yield node
            nodes += node.children


def new_root() -> Node:
    """The beginning of all prefixes; it has no page."""
    return Node(None, (), -1, None)


def match(root: Node, tokens: Sequence[int], page_tokens: int) -> tuple[list[Node], int]:
    """The nodes that hold the longest prefix of `tokens`, and how many tokens that is: the last
    node may hold more than is shared. Of two that hold as much, one whose window page is there."""
    path: list[Node] = []
    node, shared = root, 0
    while True:
        wanted = tuple(tokens[shared : shared + page_tokens])
        best, most = None, 0
        for child in node.children:
            count = _shared_prefix(child.tokens, wanted)
            better = count == most and best is not None and best.window is None
            if count > most or (better and child.window is not None):
                best, most = child, count
        if best is None:
            return path, shared
        path.append(best)
        shared += most
        if most < page_tokens:
            return path, shared
        node = best


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    if a == b:
        return len(a)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
