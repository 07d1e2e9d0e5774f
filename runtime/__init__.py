"""From an artifact to tokens, without the compiler. This folder can be copied out and used alone:
it needs tvm_ffi, numpy, tokenizers and libtvm_runtime, and imports nothing else of osscompile."""

from .engine import Engine
from .errors import ArtifactError, InputError, OsscompileError
from .generated import GeneratedToken
from .harmony import Arguments, Finish, Piece, Reasoning, Text, ToolCall, as_messages
from .model import Model, load
from .request import Request
from .usage import Usage

__all__ = [
    "Arguments",
    "ArtifactError",
    "Engine",
    "Finish",
    "GeneratedToken",
    "InputError",
    "Model",
    "OsscompileError",
    "Piece",
    "Reasoning",
    "Request",
    "Text",
    "ToolCall",
    "Usage",
    "as_messages",
    "load",
]
