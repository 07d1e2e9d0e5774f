"""A Python file of the user's -> the functions that a model may call."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path

from ..errors import InputError

MODULE = "osscompile_tools"  # the name that the file gets as a module


def read_functions(path: Path) -> list[Callable[..., object]]:
    """The public functions that a file defines, in its order; it is run, as an import would run it.
    Raises InputError."""
    specification = importlib.util.spec_from_file_location(MODULE, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise InputError(f"{path}: expected a file of Python, named *.py, found none")
    module = importlib.util.module_from_spec(specification)
    sys.modules[MODULE] = module  # where dataclasses look for their types
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside it can be imported
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # whatever the file raises
        raise InputError(
            f"{path}: expected Python that runs, found {type(error).__name__}: {error}"
        ) from error
    functions = dict.fromkeys(  # of several names for one, the first
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == MODULE and not name.startswith("_")
    )
    if not functions:
        raise InputError(f"{path}: expected public functions, found none that it defines")
    return [_printing_aside(function) for function in functions]


def _printing_aside(function: Callable[..., object]) -> Callable[..., object]:
    """The function, but what it prints goes to stderr: stdout has answers alone."""

    @wraps(function)
    def run(*arguments: object, **named: object) -> object:
        with redirect_stdout(sys.stderr):
            return function(*arguments, **named)

    return run
