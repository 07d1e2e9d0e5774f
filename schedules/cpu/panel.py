"""Matrix products of many rows of activations: weights are unpacked once for all rows that share
them, into a panel that stays in the first-level cache.

A panel is some groups of `vector_lanes` columns x some blocks of 32 inputs, of one expert or of a
dense layer. It holds bytes where the target has a byte product (`panel_int8.py`), else float32
(`panel_float.py`).
"""

from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from ...targets import Target
from ..formats import is_few
from ..product import OPS, Product
from ..records import Choose
from ..tail import split_tail
from .instructions import INSTRUCTIONS
from .panel_float import float_panels
from .panel_int8 import int8_panels
from .tail import with_tail


def panel(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule one of `OPS` with any number of rows of activations; declines others, and
    weights that do not fill vectors."""
    op = str(function.attrs["op"])
    if op not in OPS:
        return None
    product = Product(function)
    if is_few(product.num_rows) or product.columns % target.vector_lanes:
        return None
    int8 = "xq" in product.tensors and target.int8_dot in INSTRUCTIONS
    panels = int8_panels if int8 else float_panels
    scheduled = function.with_body(panels(product, target, choose))
    return with_tail(scheduled, split_tail(function)[1], product.columns, target, choose)
