"""Schedules for CPUs; they differ between CPUs by tensor intrinsic and vector width only."""

from .loops import loops
from .matmul import matmul
from .rows import rows

CPU_RULES = (
    loops,  # kernels without blocks: no other rule can read them
    matmul,
    rows,  # takes everything that is left
)
