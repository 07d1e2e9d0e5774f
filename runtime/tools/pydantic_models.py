"""pydantic's models as types of parameters; it is not imported, since who has a model did that."""

from collections.abc import Mapping
from typing import Any

from .kind import Kind, Misfit, union_schema

# Of keywords of a schema these hold no schemas.
VALUES = ("default", "enum", "const", "examples", "required")


def is_model(annotation: type) -> bool:
    return hasattr(annotation, "model_json_schema") and hasattr(annotation, "model_validate")


def model_kind(model: Any) -> Kind:
    described = model.model_json_schema()

    def read(where: str, value: Any) -> Any:
        try:
            return model.model_validate(value)
        except ValueError as error:  # a ValidationError, with pydantic's own words
            raise Misfit(f"{where}: {error}") from None

    schema = _plain(described, described.get("$defs", {}), frozenset())
    return Kind(schema, f"a {model.__name__}", read)


def _plain(schema: Any, definitions: Mapping[str, Any], above: frozenset[str]) -> Any:
    """What a model can be told of: references replaced by what they name, but for a type within
    itself, which is any value; titles, which repeat names, left out; anyOf in another form."""
    if isinstance(schema, list):
        return [_plain(below, definitions, above) for below in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: value for key, value in schema.items() if key not in ("$defs", "title")}
    name = str(schema.pop("$ref", "")).rpartition("/")[2]
    if name in definitions and name not in above:
        return _plain({**definitions[name], **schema}, definitions, above | {name})
    for key, value in schema.items():
        if key == "properties":  # of which one may be called like a keyword
            named = {name: _plain(below, definitions, above) for name, below in value.items()}
            schema[key] = named
        elif key not in VALUES:
            schema[key] = _plain(value, definitions, above)
    variants = schema.pop("anyOf", None)
    return schema if variants is None else {**union_schema(variants), **schema}
