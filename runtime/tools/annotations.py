"""Type annotations -> kinds of values: JSON schemas, and how values of those types are read."""

import collections.abc
import dataclasses
import enum
import json
import types
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from ..errors import InputError
from .kind import NULL, JSONSchema, Kind, Misfit, misfit, object_schema, read_object, union_schema
from .pydantic_models import is_model, model_kind


def read_annotation(where: str, annotation: Any) -> Kind:
    """Raises InputError for a type that cannot be described."""
    annotation = _without_names(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_description(read_annotation(where, arguments[0]), arguments[1:])
    if origin in (Required, NotRequired):
        return read_annotation(where, arguments[0])
    if origin in (Union, types.UnionType):
        return _union([read_annotation(where, argument) for argument in arguments])
    if origin is Literal:
        return _choice(where, {value: value for value in arguments})
    if annotation in (Any, object) or isinstance(annotation, TypeVar):
        return Kind({}, "any value", lambda _, value: value)
    plain = origin or annotation
    if not isinstance(plain, Hashable):
        raise _undescribed(where, annotation)
    if plain in _SIMPLE:
        return _SIMPLE[plain]
    if plain in _CONTAINERS:
        return _array(where, annotation, _CONTAINERS[plain], arguments)
    if plain in _MAPPINGS:
        return _mapping(where, annotation, arguments)
    if isinstance(annotation, type):
        return _class(where, annotation)
    raise _undescribed(where, annotation)


def type_hints(where: str, annotated: Any) -> dict[str, Any]:
    """The annotations of a function or class, those that are text evaluated. Raises InputError."""
    try:
        return get_type_hints(annotated, include_extras=True)
    except Exception as error:  # text of the user's is evaluated, which raises what it will
        raise InputError(
            f"{where}: expected annotations that can be evaluated, found {error}; define their "
            "types at the top of the module, or describe the function in OpenAI's form"
        ) from error


def _without_names(annotation: Any) -> Any:
    """The type that a NewType or an alias stands for."""
    for attribute in ("__supertype__", "__value__"):
        if hasattr(annotation, attribute):
            return _without_names(getattr(annotation, attribute))
    return annotation


def _undescribed(where: str, annotation: Any) -> InputError:
    return InputError(
        f"{where}: expected a type that JSON can say (str, int, float, bool, list, dict, Optional, "
        "Union, Literal, Enum, a TypedDict, a dataclass or a pydantic model), found "
        f"{annotation!r:.100}; describe the function in OpenAI's form, or take a str"
    )


def _read_as(
    name: str, accepted: tuple[type, ...], make: Callable[[Any], Any]
) -> Callable[[str, Any], Any]:
    def read(where: str, value: Any) -> Any:
        # For Python a truth value is a number as well.
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise misfit(where, name, value)
        return make(value)

    return read


def _read_whole(where: str, value: Any) -> int:
    """Models write 3.0 for 3."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise misfit(where, "a whole number", value)
    return int(value)


_NOTHING = Kind(NULL, "null", _read_as("null", (type(None),), lambda value: value))
_SIMPLE: Mapping[Any, Kind] = {
    str: Kind({"type": "string"}, "text", _read_as("text", (str,), str)),
    int: Kind({"type": "integer"}, "a whole number", _read_whole),
    float: Kind({"type": "number"}, "a number", _read_as("a number", (int, float), float)),
    bool: Kind({"type": "boolean"}, "true or false", _read_as("true or false", (bool,), bool)),
    None: _NOTHING,
    type(None): _NOTHING,
}
_CONTAINERS: Mapping[Any, Callable[[list[Any]], Any]] = {
    list: list,
    set: set,
    frozenset: frozenset,
    tuple: tuple,
    collections.abc.Sequence: list,
    collections.abc.Iterable: list,
    collections.abc.Collection: list,
    collections.abc.Set: set,
}
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def _with_description(kind: Kind, notes: Sequence[Any]) -> Kind:
    """The first text among the notes of an Annotated, or what a Field of pydantic's says."""
    texts = (n if isinstance(n, str) else getattr(n, "description", None) for n in notes)
    text = next((text for text in texts if isinstance(text, str)), None)
    if text is None:
        return kind
    return dataclasses.replace(kind, schema={**kind.schema, "description": text})


def _union(kinds: Sequence[Kind]) -> Kind:
    name = " or ".join(kind.name for kind in kinds)

    def read(where: str, value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(where, value)
            except Misfit:
                pass
        raise misfit(where, name, value)

    return Kind(union_schema([kind.schema for kind in kinds]), name, read)


def _choice(where: str, values: Mapping[Any, Any]) -> Kind:
    """One of JSON's values, each of which stands for another."""
    types = {type(value) for value in values}
    if not types <= _SIMPLE.keys():
        raise InputError(
            f"{where}: expected choices that are text, numbers, truth values or None, found "
            f"{list(values)!r:.100}"
        )
    schema: JSONSchema = {"enum": list(values)}
    if len(types) == 1:
        schema = {**_SIMPLE[types.pop()].schema, **schema}
    name = f"one of {', '.join(map(json.dumps, values))}"

    def read(where: str, value: Any) -> Any:
        for said, meant in values.items():
            if said == value and isinstance(said, bool) == isinstance(value, bool):
                return meant
        raise misfit(where, name, value)

    return Kind(schema, name, read)


def _array(
    where: str, annotation: Any, make: Callable[[list[Any]], Any], arguments: Sequence[Any]
) -> Kind:
    if make is tuple and arguments and arguments[1:] != (Ellipsis,):
        raise _undescribed(where, annotation)
    item = read_annotation(where, arguments[0] if arguments else Any)

    def read(where: str, value: Any) -> Any:
        if not isinstance(value, list):
            raise misfit(where, "a list", value)
        return make([item.read(f"{where}[{i}]", below) for i, below in enumerate(value)])

    return Kind({"type": "array", "items": item.schema}, "a list", read)


def _mapping(where: str, annotation: Any, arguments: Sequence[Any]) -> Kind:
    key, item = arguments or (str, Any)
    if key not in (str, Any):
        raise _undescribed(where, annotation)
    kind = read_annotation(where, item)

    def read(where: str, value: Any) -> Any:
        if not isinstance(value, dict):
            raise misfit(where, "an object", value)
        return {key: kind.read(f"{where}.{key}", below) for key, below in value.items()}

    return Kind({"type": "object", "additionalProperties": kind.schema}, "an object", read)


def _class(where: str, annotation: Any) -> Kind:
    if issubclass(annotation, enum.Enum):
        return _choice(where, {member.value: member for member in annotation})
    if is_model(annotation):
        return model_kind(annotation)
    if is_typeddict(annotation):
        hints = type_hints(where, annotation)
        # Where annotations are text, the class took all keys for required.
        optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired}
        return _object(where, hints, annotation.__required_keys__ - optional, dict)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        hints = type_hints(where, annotation)
        fields = [field for field in dataclasses.fields(annotation) if field.init]
        none = dataclasses.MISSING
        required = [f.name for f in fields if f.default is none and f.default_factory is none]
        return _object(where, {f.name: hints[f.name] for f in fields}, required, annotation)
    raise _undescribed(where, annotation)


def _object(
    where: str, hints: Mapping[str, Any], required: Collection[str], make: Callable[..., Any]
) -> Kind:
    kinds = {name: read_annotation(f"{where}.{name}", hint) for name, hint in hints.items()}
    schema = object_schema({name: kind.schema for name, kind in kinds.items()}, required)

    def read(where: str, value: Any) -> Any:
        return make(**read_object(where, value, kinds, required))

    return Kind(schema, "an object", read)
