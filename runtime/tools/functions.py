"""Python functions as tools: what a model is told of them, and what becomes of its calls."""

import dataclasses
import enum
import functools
import inspect
import json
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, TypeAlias

from ..errors import InputError
from ..harmony.builtin_tools import is_builtin
from ..harmony.calls import Call
from ..harmony.checks import read_json
from .annotations import read_annotation, type_hints
from .docstring import read_docstring
from .kind import Kind, Misfit, object_schema, read_object

# A definition in OpenAI's form, or a Python function.
Tool: TypeAlias = Mapping[str, object] | Callable[..., object]


def definitions(tools: Any) -> Any:
    """Tools of a chat, all in OpenAI's form. Raises InputError."""
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        return tools  # which the reader of definitions refuses, or takes for none
    return [
        PythonTool(f"tools[{i}]", tool).definition if callable(tool) else tool
        for i, tool in enumerate(tools)
    ]


class PythonTool:
    """A function with a name, described by its signature, annotations and docstring.

    definition: in OpenAI's form. Parameters without an annotation take any value; `*args` and
    `**kwargs` are not told of. Raises InputError for what cannot be described.
    """

    def __init__(self, where: str, function: Callable[..., object]) -> None:
        self._function = function
        self.name = _name(where, function)
        where = f"{where} ({self.name})"
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: expected a signature, found none: {error}") from None
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = [p for p in signature.parameters.values() if p.kind not in several]
        hints = type_hints(where, _annotated(function))
        self._kinds = {
            p.name: read_annotation(f"{where}: parameter {p.name}", hints.get(p.name, Any))
            for p in parameters
        }
        self._required = [p.name for p in parameters if p.default is p.empty]
        self._unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        text, told = read_docstring(inspect.getdoc(function), self._kinds)
        described: dict[str, Any] = {"name": self.name, "description": text}
        if parameters:
            properties = {
                p.name: read_json(
                    f"{where}: parameter {p.name}", _property(p, self._kinds[p.name], told)
                )
                for p in parameters
            }
            described["parameters"] = object_schema(properties, self._required)
        self.definition = {"type": "function", "function": described}

    def call(self, call: Call) -> str:
        """What the function returns, as text. Raises Misfit for arguments that do not fit, and what
        the function raises."""
        arguments = call.arguments
        if arguments is None:
            arguments = self._code(call.text)
        values = read_object("arguments", arguments, self._kinds, self._required)
        unnamed = [values.pop(name) for name in self._unnamed if name in values]
        return result_text(self._function(*unnamed, **values))

    def _code(self, text: str) -> dict[str, Any]:
        """The arguments where the text is no JSON. To a tool called python models give code, as
        they were trained to, whatever it was declared to take."""
        kinds = [kind for name, kind in self._kinds.items() if name in self._required]
        is_code = is_builtin(self.name) and [kind.name for kind in kinds] == ["text"]
        if not is_code:
            raise Misfit(f"arguments: expected a JSON object, found {text!r:.200}")
        return {self._required[0]: text}


def result_text(value: object) -> str:
    """Text as it is, other values as JSON; what JSON cannot say, in Python's words. Raises Misfit
    for what is yet to give a result."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(_finished(value), ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, a value within itself
        return str(value)


def unfinished_kind(function: Callable[..., object]) -> str:
    """What a function returns that is yet to give a result; "" for another."""
    plain = _undecorated(function)
    for code in (plain, getattr(plain, "__call__", None)):  # noqa: B004
        if inspect.iscoroutinefunction(code):
            return "a coroutine"
        if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
            return "a generator"
    return ""


def _finished(value: object) -> object:
    if not isinstance(value, Awaitable | Iterator | AsyncIterator):
        return value
    if isinstance(value, Coroutine | Generator):  # it is not to say that nobody waited for it
        value.close()
    raise Misfit(f"expected a result, found a {type(value).__name__}, which is yet to give one")


def _plain(value: Any) -> object:
    """What stands in JSON for a value that it does not know."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return list(value)
    for method in ("model_dump", "tolist"):  # of pydantic's models, and of numpy's values
        if callable(make := getattr(value, method, None)):
            return make()
    return str(_finished(value))


def _name(where: str, function: Callable[..., object]) -> str:
    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(
            f"{where}: expected a function with a name, found {function!r:.100}; define it with def"
        )
    return name


def _annotated(function: Any) -> Any:
    """Where the annotations of something callable are."""
    function = _undecorated(function)
    if inspect.isclass(function):
        return function.__init__
    return function if inspect.isroutine(function) else type(function).__call__


def _undecorated(function: Any) -> Any:
    function = inspect.unwrap(function)
    return _undecorated(function.func) if isinstance(function, functools.partial) else function


def _property(parameter: inspect.Parameter, kind: Kind, told: Mapping[str, str]) -> dict[str, Any]:
    """The schema of a parameter, with what the docstring tells of it, and its default."""
    schema = dict(kind.schema)
    if parameter.name in told:
        schema.setdefault("description", told[parameter.name])
    default = parameter.default
    if isinstance(default, enum.Enum):
        default = default.value
    is_finite = not isinstance(default, float) or math.isfinite(default)  # others are no JSON
    if isinstance(default, str | int | float) and is_finite:
        schema["default"] = default
    return schema
