"""Schedules for CPUs; they differ between CPUs by tensor intrinsic and vector width only.

Their buffers have TVM's default scope: TVM puts those below 1 KiB on the stack, and LLVM moves them
into registers. For larger ones, and for all of scope "local", TVM calls an allocator.
"""

from .attention import attention
from .few_int8 import few
from .loops import loops
from .matvec import matvec
from .panel import panel
from .rows import rows

CPU_RULES = (
    attention,
    loops,  # other kernels without blocks: no other rule can read them
    panel,  # any number of rows of activations
    few,
    matvec,  # takes what `few` does not
    rows,  # takes everything that is left
)
