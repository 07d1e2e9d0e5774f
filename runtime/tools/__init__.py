"""Tools that are run: Python functions of the user, and Python code of the model in a sandbox."""

from .loop import ToolLoop
from .sandbox import PythonSandbox

__all__ = ["PythonSandbox", "ToolLoop"]
