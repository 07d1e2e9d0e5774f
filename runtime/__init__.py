"""From an artifact to tokens, without the compiler. This folder can be copied out and used alone:
it needs tvm_ffi, numpy, tokenizers and libtvm_runtime, and imports nothing else of osscompile."""

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
