"""Errors of the compiler that users see; those of the runtime are in `runtime/errors.py`."""

from .runtime.errors import OsscompileError


class CheckpointError(OsscompileError):
    """A model to compile is incomplete, inconsistent, or not a gpt-oss."""


class AbsentError(CheckpointError):
    """A model is not here, and cannot be fetched."""


class CompileError(OsscompileError):
    """A compile cannot start or finish: its options, the disk, or the linker."""


class PlaceError(CompileError):
    """Where the artifact should be is no room for it, or nothing can be written. `problem` is the
    message without what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


class RemoteError(OsscompileError):
    """A far machine cannot be reached, or does not do what it is asked to."""
