"""Tiles of the rows of activations. Rows of one expert follow each other: a tile that holds several
experts takes their rows one expert after the other."""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from ..product import Product


@dataclass(frozen=True)
class RowTiles:
    """Tiles of `size` rows of a product's activations."""

    product: Product
    size: int

    def count(self) -> Expr:
        return (self.product.num_rows + (self.size - 1)) // self.size

    def row(self, tile: Expr, t: Expr) -> Expr:
        """Return row t of a tile; those past the last repeat the last, and are not kept."""
        return T.min(tile * self.size + t, self.product.num_rows - 1)

    def begins(self, tile: Expr, t: Expr) -> Expr:
        """Whether row t is the first row of its expert in the tile."""
        expert = self.product.expert
        if expert is None:
            return t == 0
        before = expert[self.row(tile, T.max(t - 1, T.int64(0)))]
        exists = tile * self.size + t < self.product.num_rows
        return T.And(exists, T.Or(t == 0, expert[self.row(tile, t)] != before))

    def belongs(self, tile: Expr, t: Expr, first: Expr) -> Expr:
        """Whether row t exists and has the expert of row `first`."""
        expert = self.product.expert
        exists = tile * self.size + t < self.product.num_rows
        if expert is None:
            return exists
        return T.And(exists, expert[self.row(tile, t)] == expert[self.row(tile, first)])

    def touches(self, tile: Expr, begin: Expr, last: Expr, first: Expr) -> Expr:
        """Whether any row from `begin` to `last` has the expert whose first row is `first`."""
        after = T.Or(begin <= first, self.belongs(tile, begin, first))
        return T.And(last >= first, after)
