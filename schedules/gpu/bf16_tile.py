"""A work-group's tile in a product of bfloat16: what it owns, and where its numbers lie."""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK, PANEL, const, panel_input
from ..product import Product
from . import wgmma
from .weight_words import Fp4Words, Int8Words
from .wgmma import PIECE, ROW_WORDS, STEP


@dataclass(frozen=True)
class Tile:
    """Where a work-group's numbers lie. A stage of its shared memory holds the rows of activations
    of a step, and after them the stored words of its rows of weights."""

    product: Product
    warpgroups: int
    rows: int
    stages: int

    @property
    def threads(self) -> int:
        return self.warpgroups * wgmma.THREADS

    @property
    def columns(self) -> int:
        return self.warpgroups * wgmma.ROWS // self.product.halves

    @property
    def groups(self) -> int:
        """Tiles side by side; the last may have places that do not exist."""
        return -(-self.places // self.columns)

    @property
    def places(self) -> int:
        """Of a row of results in memory: its columns, or whole panels."""
        if self.product.halves == 1:
            return self.product.columns
        return -(-self.product.columns // PANEL) * PANEL

    @property
    def steps(self) -> int:
        return -(-self.product.blocks * BLOCK // STEP)

    @property
    def format(self) -> type[Fp4Words] | type[Int8Words]:
        return Int8Words if self.product.expert is None else Fp4Words

    @property
    def pieces(self) -> int:
        """Pieces of stored words in a row of weights and a step."""
        return self.format.words * 4 // PIECE

    @property
    def stage_words(self) -> int:
        weights = self.warpgroups * wgmma.ROWS * self.pieces * PIECE
        return self.rows * ROW_WORDS + weights

    def half(self, row: Expr) -> Expr:
        return row // 8 % 2 if self.product.halves == 2 else const(0, "int64")

    def place(self, group: Expr, row: Expr) -> Expr:
        """Return which column, as results lie in memory, a row of weights computes."""
        if self.product.halves == 1:
            return group * self.columns + row
        return group * self.columns + row // 16 * 8 + row % 8

    def column(self, group: Expr, row: Expr) -> Expr:
        """Return the column of a row of weights; one that does not exist repeats the last."""
        place = self.place(group, row)
        if self.product.halves == 2:  # results are panels
            place = place // PANEL * PANEL + panel_input(place % PANEL)
        return T.min(place, const(self.product.columns - 1, "int64"))

    def weights(
        self, expert: Expr, group: Expr, row: Expr, s: Expr, block: Expr
    ) -> tuple[Expr, ...]:
        """Return the indices of a block of step s, 0 or 1, in a row of weights. What does not exist
        repeats the last, and its activations are zero."""
        block = self.existing(s) * (STEP // BLOCK) + block
        if self.product.blocks % 2 != 0:
            block = T.min(block, const(self.product.blocks - 1, "int64"))
        return self.product.weight_at(expert, self.half(row), self.column(group, row), block)

    def existing(self, s: Expr) -> Expr:
        """Return a step, or for those past the last that one."""
        return T.min(s, self.steps - 1)

    def stored(self, word: Expr) -> Expr:
        """Return where a word of the tile's rows of weights lies in a stage."""
        return word + self.rows * ROW_WORDS

    def row(self, thread: Expr, i: Expr) -> Expr:
        """Return a thread's i-th row of weights, of two."""
        return thread // wgmma.THREADS * wgmma.ROWS + wgmma.row(thread) + i * 8

    def copied(self, thread: Expr, i: Expr) -> Expr:
        """Return the i-th row of activations of which a thread copies a piece."""
        return i * (self.threads // 8) + thread // 8
