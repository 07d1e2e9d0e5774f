"""Errors of the compiler that users see; those of the runtime are in `runtime/errors.py`."""

from .runtime.errors import OsscompileError


class CheckpointError(OsscompileError):
    """A model to compile is incomplete, inconsistent, or not a gpt-oss."""


class CompileError(OsscompileError):
    """A compile cannot start or finish: its options, the disk, or the linker."""


class RemoteError(OsscompileError):
    """A far machine cannot be reached, or does not do what it is asked to."""
