"""Loads through a GPU's texture units, which have a cache of their own.

`TEXEL` names a function that a target's source begins with, uint32x4 (image, int32 index), which
reads 16 bytes of memory through the texture units. A kernel that uses it takes the memory as an
image, not as a pointer.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

TEXEL = "load_texel"
WORDS = 4  # 32-bit words in a texel


def load_texel(flat: Buffer, at: Expr) -> Expr:
    """Load the 32-bit elements `at` to `at` + 3; `at` is a multiple of 4."""
    texel = T.call_pure_extern(f"uint32x{WORDS}", TEXEL, flat.data, (at // WORDS).astype("int32"))
    return texel if str(flat.dtype) == "uint32" else T.reinterpret(texel, dtype="float32x4")
