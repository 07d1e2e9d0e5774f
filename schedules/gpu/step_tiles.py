"""The tiles of an attention kernel of one token that also rotates its queries, extends the cache,
and may quantise its result: `osscompile/passes/join_attention.py` makes such kernels."""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ...targets import Target
from ..formats import BLOCK, const
from ..stages import Stages
from .quantize_lanes import quantize_lanes
from .token_tiles import TokenTiles

STEP_OP = "attention_step"


def takes_step(function: PrimFunc, target: Target) -> bool:
    """Whether there is a schedule of such a kernel: the lanes of a subgroup quantise a block."""
    fills = int(function.params[0].shape[3]) % BLOCK == 0
    return target.has_shuffles and fills and int(function.attrs["window"]) != 1


class StepTiles(TokenTiles):
    """Its one tile has one token. The cache has the keys before it; its own key and value are
    computed, and written to the cache."""

    def __init__(self, function: PrimFunc, chunk: int) -> None:
        super().__init__(function, 1, chunk)
        self._stages = Stages(function)
        self._results = tuple(function.params[7:])
        if self.window is not None:
            self.window -= 1  # of the keys before it

    def last_key(self, tile: Expr, row: Expr) -> Expr:
        return super().last_key(tile, row) - 1

    def query_at(self, token: Expr, head: Expr, d: Expr) -> Expr:
        return self._stages.value("out", (token, head, d), {})

    def own_key(self, token: Expr, kv_head: Expr, d: Expr) -> Expr:
        """Return an element as the cache will have it."""
        return self._stages.value("keys", (token, kv_head, d), {})

    def own_value(self, token: Expr, kv_head: Expr, d: Expr) -> Expr:
        return self._stages.value("values", (token, kv_head, d), {})

    def append(self) -> Callable[..., object]:
        """Return a macro (key, value, token, kv_head, d) that writes element d to the cache."""
        keys, values, per_tile = self.keys, self.values, self.per_tile

        def slot(token: Expr) -> tuple[Expr, Expr]:
            return self.place(token, self.last_key(token, const(0, "int64")) + 1)

        @T.macro
        def append(key, value, token, kv_head, d):  # type: ignore[no-untyped-def]
            keys[
                slot(token)[0], kv_head, slot(token)[1] // per_tile, d, slot(token)[1] % per_tile
            ] = key
            values[slot(token)[0], kv_head, slot(token)[1], d] = value

        return append  # type: ignore[no-any-return]

    def keep(self) -> Callable[..., object]:
        """Return a macro (value, token, head, d, kept, largest, scales, whole) that writes an
        element of the result; see `quantize_lanes`. The lanes of a subgroup have a block."""
        if len(self._results) == 1:
            return super().keep()
        head_dim = self.head_dim
        quantize = quantize_lanes(self._stages, "out", self._results)

        @T.macro
        def keep(value, token, head, d, kept, largest, scales, whole):  # type: ignore[no-untyped-def]
            quantize(
                value,
                token,
                (head * head_dim + d) // BLOCK,
                d % BLOCK,
                kept,
                largest,
                scales,
                whole,
            )

        return keep  # type: ignore[no-any-return]
