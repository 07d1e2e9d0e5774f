"""The tile of a work-group in a product of bfloat16 with few rows of activations: what it owns, and
where its numbers lie."""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import BLOCK, PANEL, const
from ..product import Product
from . import mma_bf16
from .weight_words import Fp4Words, Int8Words
from .wgmma import PIECE

WARPS = 16  # at most, among which the inputs are divided
PIECE_BYTES = PIECE * 4
BANKS = 32  # of shared memory: words whose number has the same rest lie in one


@dataclass(frozen=True)
class FewTile:
    """A work-group multiplies up to `rows` rows of activations with strips of 16 rows of weights,
    one after the other: those of 16 columns, or of 8 with both halves.

    A stage of shared memory holds a strip: its rows of stored words, then their scales.
    """

    product: Product
    rows: int
    stages: int

    @property
    def panels(self) -> int:
        return -(-self.product.blocks * BLOCK // PANEL)

    @property
    def panels_each(self) -> int:
        """Panels of the inputs that a warp multiplies."""
        return -(-self.panels // WARPS)

    @property
    def warps(self) -> int:
        return -(-self.panels // self.panels_each)

    @property
    def threads(self) -> int:
        return self.warps * mma_bf16.WARP

    @property
    def columns(self) -> int:
        return mma_bf16.ROWS // self.product.halves

    @property
    def strips(self) -> int:
        return self.product.columns // self.columns

    @property
    def num_sums(self) -> int:
        """Sums of a thread."""
        return self.rows // mma_bf16.TOKENS * mma_bf16.SUMS

    @property
    def format(self) -> type[Fp4Words] | type[Int8Words]:
        return Int8Words if self.product.expert is None else Fp4Words

    @property
    def row_words(self) -> int:
        """Stored words in a row of weights."""
        return self.format.words * 2 * self.product.blocks

    @property
    def stride(self) -> int:
        """Words between rows of a stage: threads that read together find different banks."""
        return self.row_words + (self.format.words * 4 - self.row_words) % BANKS

    @property
    def scale_bytes(self) -> int:
        """Bytes of a strip's scales in one half."""
        return self.columns * self.product.blocks * (1 if self.format is Fp4Words else 2)

    @property
    def stage_words(self) -> int:
        return mma_bf16.ROWS * self.stride + self.product.halves * self.scale_bytes // 4

    @property
    def shared_bytes(self) -> int:
        """Bytes of all stages, and of sums that warps leave for each other, twice."""
        sums = 2 * self.warps * self.num_sums * mma_bf16.WARP * 4
        return self.stages * self.stage_words * 4 + sums

    @property
    def num_results(self) -> int:
        """Results of a strip, of which a thread computes one at most."""
        return self.rows * self.columns

    @property
    def fits(self) -> bool:
        """Whether strips can be copied in whole pieces, results fill panels, and there are threads
        for all results."""
        columns = PANEL if self.product.halves == 2 else self.columns
        whole = self.product.columns % columns == 0 and self.scale_bytes % PIECE_BYTES == 0
        return whole and self.num_results <= self.threads

    def stage(self, strip: Expr) -> Expr:
        """Return the word at which a strip's stage begins."""
        return strip % self.stages * self.stage_words

    def panel(self, warp: Expr, i: Expr) -> Expr:
        """Return the i-th panel of a warp; one that does not exist repeats the last, and its
        activations are zero."""
        return T.min(i * self.warps + warp, const(self.panels - 1, "int64"))

    def word(self, row: Expr, panel: Expr, quarter: Expr) -> Expr:
        """Return where the words of a quarter of a panel lie in a stage."""
        return row * self.stride + (panel * 4 + quarter) * self.format.words

    def scale(self, row: Expr, panel: Expr, quarter: Expr) -> Expr:
        """Return the number of the scale of a quarter of a panel in a stage's scales."""
        last = const(self.product.blocks - 1, "int64")
        return row * self.product.blocks + T.min(panel * 2 + quarter // 2, last)
