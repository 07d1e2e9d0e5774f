"""The version of osscompile, by itself: packaging reads it, and so do artifacts and benches."""

__version__ = "0.1.0"
