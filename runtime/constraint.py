"""What an answer must be: which tokens may come next."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import OsscompileError

MASK_BITS = 32  # of a word


class Constraint(Protocol):
    """Told every token of an answer, it says which may follow."""

    @property
    def error(self) -> OsscompileError | None:
        """Why the answer cannot go on, if so: what `mask` said last is then of no use."""

    def mask(self) -> NDArray[np.uint32] | None:
        """Bits [ceil(vocabulary / 32)], the lowest first: 1 for an id that may come next, of which
        there is one at least that is not reserved. None: any may."""

    def push(self, token_id: int) -> None:
        """The token that came."""


def mask_of(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """The bits of a mask, of bool [vocab]."""
    padded = np.pad(allowed, (0, -allowed.size % MASK_BITS))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def is_allowed(mask: NDArray[np.uint32], vocab: int) -> NDArray[np.bool_]:
    """bool [vocab]."""
    octets: NDArray[Any] = mask.astype("<u4", copy=False).view(np.uint8)
    return np.unpackbits(octets, bitorder="little", count=vocab).view(np.bool_)
