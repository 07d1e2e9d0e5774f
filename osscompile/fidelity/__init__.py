"""How near an artifact is to its checkpoint: both score the same text."""

from .measure import measure_fidelity

__all__ = ["measure_fidelity"]
