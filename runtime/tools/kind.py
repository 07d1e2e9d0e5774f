"""Kinds of values that tools take: what a model is told of them, and how they are read."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

JSONSchema: TypeAlias = dict[str, Any]
NULL: JSONSchema = {"type": "null"}


class Misfit(Exception):
    """A value that a parameter does not take; its text is for the model."""


@dataclass(frozen=True)
class Kind:
    """schema: what the model is told. name: what such a value is called. read: makes the value of
    one of JSON's, or raises Misfit that begins with where it stands."""

    schema: JSONSchema
    name: str
    read: Callable[[str, Any], Any]


def misfit(where: str, expected: str, value: Any) -> Misfit:
    return Misfit(f"{where}: expected {expected}, found {json.dumps(value):.100}")


def union_schema(schemas: Sequence[JSONSchema]) -> JSONSchema:
    """Any of several. Types that the model's TypeScript can name are a list; among other choices it
    knows no null, of which `nullable` tells, and would make `any` of an anyOf."""
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    others = [schema for schema in schemas if schema != NULL]
    chosen = others[0] if len(others) == 1 else {"oneOf": others}
    return chosen if len(others) == len(schemas) else {**chosen, "nullable": True}


def object_schema(properties: Mapping[str, JSONSchema], required: Collection[str]) -> JSONSchema:
    schema: JSONSchema = {"type": "object", "properties": dict(properties)}
    needed = [name for name in properties if name in required]
    return {**schema, "required": needed} if needed else schema


def read_object(
    where: str, value: Any, kinds: Mapping[str, Kind], required: Collection[str]
) -> dict[str, Any]:
    """The values of an object's properties; those that are absent are not among them. Raises
    Misfit."""
    if not isinstance(value, dict):
        raise misfit(where, "an object", value)
    known = ", ".join(kinds) or "no properties"
    for key in value:
        if key not in kinds:
            raise misfit(where, known, key)
    for key in kinds:
        if key in required and key not in value:
            raise Misfit(f"{where}: expected a value of {key}, found none")
    return {key: kinds[key].read(f"{where}.{key}", item) for key, item in value.items()}
