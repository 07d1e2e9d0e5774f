"""The results of a strip in a product of bfloat16 with few rows of activations, from the sums that
the warps leave for each other."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr, TensorLoad
from tvm.script import tirx as T
from tvm.tirx import Buffer
from tvm_ffi import structural_equal, structural_map

from ..formats import PANEL, const, float32_to_bf16, panel_place
from . import mma_bf16
from .few_tile import FewTile

MOST_READ = 2  # numbers that a result takes beside sums: bias of both halves, or bias and residual


@dataclass(frozen=True)
class Of:
    """The rows [first, end) of an expert."""

    first: Expr
    end: Expr
    expert: Expr


def keep_sums(tile: FewTile) -> Callable[..., object]:
    """Return statements that leave a thread's sums of a strip for the other warps."""

    @T.macro
    def keep(left, sums, s, at):  # type: ignore[no-untyped-def]
        for i in T.unroll(tile.num_sums):
            T.evaluate(
                T.call_extern(
                    "void",
                    mma_bf16.LEAVE,
                    T.address_of(left[s % 2, at.warp, i, at.lane]),
                    sums[i],
                )
            )

    return keep  # type: ignore[no-any-return]


def read_early(tile: FewTile) -> Callable[..., object]:
    """Return statements that read what a thread's result of a strip takes beside sums: when it is
    wanted, it has come."""

    def read(of: Of, strip: Expr, thread: Expr, i: Expr) -> Expr:
        loads = _Result(tile, of, strip, thread).loads
        chosen = loads[-1] if loads else const(0, "float32")
        for number, load in reversed(list(enumerate(loads[:-1]))):
            chosen = T.Select(i == number, load, chosen)
        return chosen

    @T.macro
    def read_all(early, of, strip, thread):  # type: ignore[no-untyped-def]
        if thread < tile.num_results:
            for i in T.unroll(MOST_READ):
                early[i] = read(of, strip, thread, i)

    return read_all  # type: ignore[no-any-return]


def finish_strip(tile: FewTile) -> Callable[..., object]:
    """Return statements that add up the sums that all warps left of a strip, and write a thread's
    result."""
    product = tile.product

    def column(strip: Expr, thread: Expr) -> Expr:
        return strip * tile.columns + _column(tile, thread)

    @T.macro
    def write(totals, early, of, strip, thread):  # type: ignore[no-untyped-def]
        if product.halves == 2:
            product.tensors["xb_out"][
                of.first + _token(tile, thread),
                column(strip, thread) // PANEL,
                panel_place(column(strip, thread) % PANEL),
            ] = float32_to_bf16(_Result(tile, of, strip, thread).value(totals, early))
        else:
            product.out[of.first + _token(tile, thread), column(strip, thread)] = _Result(
                tile, of, strip, thread
            ).value(totals, early)

    @T.macro
    def finish(left, early, of, s, strip, thread):  # type: ignore[no-untyped-def]
        totals = T.alloc_buffer((product.halves,), "float32", scope="local")
        if thread < tile.num_results:
            for half in T.unroll(product.halves):
                totals[half] = T.float32(0)
                for warp in T.unroll(tile.warps):
                    totals[half] += left[
                        s % 2, warp, _sum(tile, thread) + half * 2, thread % mma_bf16.WARP
                    ]
            if of.first + _token(tile, thread) < of.end:
                write(totals, early, of, strip, thread)

    return finish  # type: ignore[no-any-return]


def _sum(tile: FewTile, thread: Expr) -> Expr:
    """Return which sum of each lane a thread adds up; with two halves, that of the first."""
    number = thread // mma_bf16.WARP
    return number if tile.product.halves == 1 else number // 2 * 4 + number % 2


def _token(tile: FewTile, thread: Expr) -> Expr:
    return mma_bf16.token(thread % mma_bf16.WARP, _sum(tile, thread))


def _column(tile: FewTile, thread: Expr) -> Expr:
    """Return the column of a thread's result in a strip."""
    row = mma_bf16.row(thread % mma_bf16.WARP)
    return row if tile.product.halves == 2 else row + _sum(tile, thread) // 2 % 2 * 8


class _Result:
    """A thread's result of a strip. A row that does not exist repeats the last."""

    def __init__(self, tile: FewTile, of: Of, strip: Expr, thread: Expr) -> None:
        row = T.min(of.first + _token(tile, thread), of.end - 1)
        column = strip * tile.columns + _column(tile, thread)
        self.tile, self.of, self.row, self.column = tile, of, row, column
        self.loads: list[Expr] = []
        self._output(lambda half: const(0, "float32"), lambda load: self.loads[self._number(load)])

    def value(self, totals: Buffer, early: Buffer) -> Expr:
        factor = const(self.tile.format.factor, "float32")
        return self._output(
            lambda half: totals[half] * factor, lambda load: early[self._number(load)]
        )

    def _number(self, load: Expr) -> int:
        """Return the number of a load, which may come more than once."""
        same = (i for i, known in enumerate(self.loads) if structural_equal(load, known))
        number = next(same, len(self.loads))
        self.loads += [load] * (number == len(self.loads))
        return number

    def _output(self, sum_of: Callable[[Expr], Expr], read: Callable[[Expr], Expr]) -> Expr:
        product = self.tile.product
        value = product.output(self.row, self.column, sum_of, self.of.expert)
        parameters = set(product.tensors.values())

        def load(found: TensorLoad) -> Expr:
            return read(found) if found.source in parameters else found

        return structural_map(value, (TensorLoad, load))
