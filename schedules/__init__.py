"""Decisions about kernels: rules by family of machines, tensor intrinsics, and tuned records."""

from .callers import show_callers_without_source

show_callers_without_source()  # before any kernel is parsed: they all use these formats
