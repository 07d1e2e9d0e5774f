"""From an artifact to tokens, without the compiler. This folder can be copied out and used alone:
it needs tvm_ffi, numpy, tokenizers and libtvm_runtime, and imports nothing else of osscompile.

Public names resolve on first use, because `python -m` runs this file before the command, which
answers an interrupt while all else is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .errors import ArtifactError, InputError, OsscompileError
    from .generated import GeneratedToken
    from .harmony import (
        Arguments,
        Call,
        Finish,
        Piece,
        Reasoning,
        Text,
        ToolCall,
        ToolResult,
        as_messages,
        calls_of,
    )
    from .model import Model, load
    from .request import Request
    from .tools import PythonSandbox, ToolLoop
    from .usage import Usage

__all__ = [
    "Arguments",
    "ArtifactError",
    "Call",
    "Engine",
    "Finish",
    "GeneratedToken",
    "InputError",
    "Model",
    "OsscompileError",
    "Piece",
    "PythonSandbox",
    "Reasoning",
    "Request",
    "Text",
    "ToolCall",
    "ToolLoop",
    "ToolResult",
    "Usage",
    "as_messages",
    "calls_of",
    "load",
]

# Public names that are defined elsewhere than in `harmony`.
_PLACES = {
    "ArtifactError": "errors",
    "Engine": "engine",
    "GeneratedToken": "generated",
    "InputError": "errors",
    "Model": "model",
    "OsscompileError": "errors",
    "PythonSandbox": "tools",
    "Request": "request",
    "ToolLoop": "tools",
    "Usage": "usage",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{_PLACES.get(name, 'harmony')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
