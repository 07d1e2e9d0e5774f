"""A Python file of the user's -> the functions that a model may call."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial, wraps
from pathlib import Path
from typing import Any

from ..errors import InputError

MODULE = "osscompile_tools"  # the name that the file gets as a module


def read_functions(path: Path) -> list[Callable[..., object]]:
    """The public functions that a file defines, in its order; it is run, as an import would run it.
    It says which look like those and are none. Raises InputError."""
    specification = importlib.util.spec_from_file_location(MODULE, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise InputError(f"{path}: expected a file of Python, named *.py, found none")
    module = importlib.util.module_from_spec(specification)
    sys.modules[MODULE] = module  # where dataclasses look for their types
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside it can be imported
    try:
        with redirect_stdout(sys.stderr):
            specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file raises
        raise InputError(
            f"{path}: expected Python that runs, found {type(error).__name__}: {error}"
        ) from error
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    named: dict[int, tuple[str, Callable[..., object]]] = {}
    for name, value in public.items():
        if _is_defined(value):
            named.setdefault(id(value), (name, value))  # of several names for one, the first
        elif inspect.isfunction(value) and value.__name__ != name:  # else it is imported
            print(f"{path}: {name} is left out, a function of {value.__module__}", file=sys.stderr)
    if not named:
        raise InputError(f"{path}: expected public functions, found none that it defines")
    return [_named(name, function) for name, function in named.values()]


def _is_defined(value: Any) -> bool:
    """Whether the file makes this function, decorated or not, or this object that is called as one.
    Classes and other types are for annotations."""
    is_type = inspect.isclass(value) or hasattr(value, "__supertype__")
    is_made_here = isinstance(value, partial) or getattr(value, "__module__", None) == MODULE
    return callable(value) and not is_type and is_made_here


def _named(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function under the name that the file gives it; what it prints goes to stderr: stdout has
    answers alone."""

    @wraps(function)
    def run(*arguments: object, **named: object) -> object:
        with redirect_stdout(sys.stderr):
            return function(*arguments, **named)

    run.__name__ = name
    if isinstance(function, partial):  # whose own is about partial
        run.__doc__ = function.func.__doc__
    return run
