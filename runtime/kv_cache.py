"""The KV cache: which tokens it holds, and how far it can go back.

Full layers keep every position. A sliding layer keeps a ring of window + chunk positions, so that
the last `chunk` of them can be taken back; a snapshot of the rings reaches further.

Work can end anywhere, by an error or a signal. So `tokens` never says more than what the arrays
hold: it is cut before they change, and grows after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .manifest import Manifest

KEYS_PER_TILE = 16  # keys are [heads, positions / 16, dim, 16], values [heads, positions, dim]


class CacheMemory(Protocol):
    """What a device does with the arrays of the cache, which lie in its memory."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any: ...

    def copy(self, array: Any) -> Any: ...

    def restore(self, array: Any, saved: Any) -> None:
        """Write back what `copy` gave of it."""

    def clear(self, array: Any, count: int) -> None:
        """Set the first `count` along axis 1 to zero, or all if there are fewer."""


@dataclass(frozen=True)
class _Snapshot:
    tokens: list[int]
    written: int
    rings: list[Any]


class KVCache:
    """Arrays of every layer, in the order of the manifest, and the tokens they hold."""

    def __init__(self, manifest: Manifest, memory: CacheMemory) -> None:
        self._memory = memory
        self.arrays = [memory.zeros(c.shape, c.dtype) for c in manifest.caches]
        self.tokens: list[int] = []
        self._chunk = manifest.chunk
        self._written = 0  # positions that the rings hold are among the last before this one
        self._dirty = 0  # positions that were written since all were zero
        pairs = zip(self.arrays[0::2], self.arrays[1::2], manifest.sliding, strict=True)
        self._rings = [a for keys, values, sliding in pairs if sliding for a in (keys, values)]
        self._snapshot: _Snapshot | None = None

    def begin(self, count: int) -> int:
        """Where `count` positions are about to be written: after the tokens.

        What they overwrite counts as lost from now on, even if no `append` follows.
        """
        start = len(self.tokens)
        self._written = max(self._written, start + count)
        self._dirty = max(self._dirty, self._written)
        return start

    def append(self, tokens: Sequence[int]) -> None:
        """The tokens were written."""
        self.tokens += tokens

    def reuse(self, tokens: Sequence[int]) -> int:
        """Keep the longest prefix of `tokens` that can be kept; how many that is."""
        shared = _shared_prefix(self.tokens, tokens)
        if self._written - shared > self._chunk:
            shared = self._restore(tokens)
        del self.tokens[shared:]
        if self._snapshot is not None and shared < len(self._snapshot.tokens):
            self._snapshot = None  # what follows overwrites its positions in the full layers
        return shared

    def clear(self) -> None:
        """Forget everything, and set what was ever written to zero: what is not a number would
        spoil even what does not look at it."""
        self.tokens, self._snapshot = [], None
        tiles = -(-self._dirty // KEYS_PER_TILE)
        for keys, values in zip(self.arrays[0::2], self.arrays[1::2], strict=True):
            self._memory.clear(keys, tiles)
            self._memory.clear(values, self._dirty)
        self._written = self._dirty = 0

    def save(self) -> None:
        """Remember the rings as they are: a later `reuse` can come back to this point."""
        rings = [self._memory.copy(ring) for ring in self._rings]
        self._snapshot = _Snapshot(list(self.tokens), self._written, rings)

    def _restore(self, tokens: Sequence[int]) -> int:
        """Go back to the snapshot, or else to nothing; how many of `tokens` can be kept then."""
        snapshot = self._snapshot
        shared = _shared_prefix(snapshot.tokens, tokens) if snapshot is not None else 0
        self.tokens = []
        if snapshot is None or shared == 0 or snapshot.written - shared > self._chunk:
            self._written = 0
            return 0
        for ring, saved in zip(self._rings, snapshot.rings, strict=True):
            self._memory.restore(ring, saved)
        self._written = snapshot.written  # more than its tokens, where some were taken back
        self.tokens = list(snapshot.tokens)
        return shared


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
