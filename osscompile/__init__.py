"""osscompile compiles gpt-oss models into artifacts that a minimal runtime executes.

Public names resolve on first use, because `import osscompile.runtime` runs this file too and must
stay free of the compiler.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler import compile
    from .errors import CheckpointError, CompileError
    from .runtime import (
        ArtifactError,
        Engine,
        InputError,
        Model,
        OsscompileError,
        PythonSandbox,
        load,
    )
    from .runtime.version import __version__ as __version__
    from .targets import TargetError

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "CompileError",
    "Engine",
    "InputError",
    "Model",
    "OsscompileError",
    "PythonSandbox",
    "TargetError",
    "compile",
    "load",
]

# A wheel holds schedules/, targets/ and runtime/ inside this folder, a checkout beside it.
_here = Path(__file__).parent
if not (_here / "runtime").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name == "compile":
        try:
            from . import threads  # noqa: F401
        except RuntimeError as error:  # nor can what makes them be imported while a process ends
            from .errors import ThreadError

            raise ThreadError(error) from error
        from .compiler import compile

        return compile
    if name in ("CheckpointError", "CompileError"):
        from . import errors

        return getattr(errors, name)
    if name == "TargetError":
        from .targets import TargetError

        return TargetError
    if name == "__version__":
        from .runtime.version import __version__

        return __version__
    if name in __all__:
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
