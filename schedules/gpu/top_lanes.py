"""Find the experts of a token: a subgroup ranks them by their logits, wherever these are needed.

`GREATEST` and `LEAST` name functions that a target's source begins with: int32 (int32 x) of a
thread -> the greatest, or the least, of all threads of its subgroup, which all must call it.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from ..formats import const, ordered_bits
from .lanes import LANES

GREATEST = "greatest_of_lanes"
LEAST = "least_of_lanes"
_TAKEN = -(1 << 31)  # below the bits of every logit
_NOBODY = (1 << 31) - 1


def top_lanes(logits: Buffer, top_k: int) -> Callable[..., object]:
    """Return a macro (ids, bits, best, thread) that sets ids [top_k] int32 to the experts with the
    greatest logits [1, experts], the best first, ties to the lower id, in every thread.

    A thread has bits [`num_each`] and best [1], both int32, for itself: it looks at every 32nd.
    """
    experts = int(logits.shape[1])
    each = num_each(logits)

    def bits_of(expert: Expr) -> Expr:
        logit = logits[0, T.min(expert, const(experts - 1, "int64"))]
        return T.Select(expert < experts, ordered_bits(logit), const(_TAKEN, "int32"))

    def number(expert: Expr, bits: Expr, best: Expr) -> Expr:
        return T.Select(bits == best, expert.astype("int32"), const(_NOBODY, "int32"))

    @T.macro
    def find(ids, bits, best, thread):  # type: ignore[no-untyped-def]
        for j in T.unroll(each):
            bits[j] = bits_of(j * LANES + thread)
        for k in T.unroll(top_k):
            best[0] = bits[0]
            for j in T.unroll(each - 1):
                best[0] = T.max(best[0], bits[j + 1])
            best[0] = T.call_extern("int32", GREATEST, best[0])
            ids[k] = _NOBODY
            for j in T.unroll(each):
                ids[k] = T.min(ids[k], number(j * LANES + thread, bits[j], best[0]))
            ids[k] = T.call_extern("int32", LEAST, ids[k])
            for j in T.unroll(each):
                bits[j] = T.Select(
                    T.Cast("int32", j * LANES + thread) == ids[k], T.int32(_TAKEN), bits[j]
                )

    return find  # type: ignore[no-any-return]


def num_each(logits: Buffer) -> int:
    """Return how many experts a thread looks at."""
    return -(-int(logits.shape[1]) // LANES)
