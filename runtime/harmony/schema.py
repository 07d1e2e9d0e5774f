"""JSON schemas of functions and formats, checked as far as the model is told of them."""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError

# The keywords that hold text, lists, and schemas: by name, in an object, one, or in a list.
TEXTS = ("title", "description")
LISTS = ("enum", "examples", "required", "oneOf", "anyOf", "allOf")
CHOICES = ("oneOf", "anyOf", "allOf")


def check_schema(where: str, schema: Any) -> None:
    """Raises InputError that names the keyword whose value has another form; None is left out."""
    if isinstance(schema, bool):
        return
    _expect(isinstance(schema, Mapping), where, "a JSON schema", schema)
    found = {key: value for key, value in schema.items() if value is not None}
    kind, properties, items = found.get("type"), found.get("properties", {}), found.get("items", [])
    _expect(kind is None or _are_texts([kind]) or _are_texts(kind), f"{where}.type", "names", kind)
    _expect(isinstance(properties, Mapping), f"{where}.properties", "an object", properties)
    for key in TEXTS:
        _expect(isinstance(found.get(key, ""), str), f"{where}.{key}", "text", found.get(key))
    for key in LISTS:
        _expect(isinstance(found.get(key, []), list), f"{where}.{key}", "a list", found.get(key))
    required = found.get("required", [])
    _expect(_are_texts(required), f"{where}.required", "names of properties", required)
    for name, below in properties.items():
        check_schema(f"{where}.properties.{name}", below)
    for below in items if isinstance(items, list) else [items]:
        check_schema(f"{where}.items", below)
    for key in CHOICES:
        for i, below in enumerate(found.get(key, [])):
            check_schema(f"{where}.{key}[{i}]", below)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _expect(holds: bool, where: str, expected: str, found: object) -> None:
    if not holds:
        raise InputError(f"{where}: expected {expected}, found {found!r:.100}")
