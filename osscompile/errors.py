"""Errors of the compiler that users see; those of the runtime are in `runtime/errors.py`."""

from .runtime.errors import OsscompileError


class CheckpointError(OsscompileError):
    """A model to compile is incomplete, inconsistent, or not a gpt-oss."""


class TargetError(OsscompileError):
    """A target is unknown, incomplete, or cannot run what was asked of it."""
