"""Schedules for CPUs; they differ between CPUs by tensor intrinsic and vector width only."""

from .attention import attention
from .loops import loops
from .matvec import matvec
from .panel import panel
from .rows import rows

CPU_RULES = (
    attention,
    loops,  # other kernels without blocks: no other rule can read them
    panel,  # any number of rows of activations; `matvec` takes a few
    matvec,
    rows,  # takes everything that is left
)
