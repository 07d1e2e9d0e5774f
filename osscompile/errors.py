"""Errors of the compiler that users see; those of the runtime are in `runtime/errors.py`."""

from .runtime.errors import OsscompileError


class CheckpointError(OsscompileError):
    """A model to compile is incomplete, inconsistent, or not a gpt-oss."""


class AbsentError(CheckpointError):
    """A model is not here, and cannot be fetched."""


class CompileError(OsscompileError):
    """A compile cannot start or finish: its options, the disk, or the linker."""


class ThreadError(CompileError):
    """No thread can begin: the process ends, or has too many. `problem`: how Python tells it."""

    def __init__(self, problem: RuntimeError) -> None:
        super().__init__(
            f"compile: expected a process in which threads can begin, found: {problem}; call it "
            "before the process ends"
        )


class PlaceError(CompileError):
    """Where the artifact should be is no room for it, or nothing can be written. `problem` is the
    message without what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


class RemoteError(OsscompileError):
    """A far machine cannot be reached, or does not do what it is asked to."""
