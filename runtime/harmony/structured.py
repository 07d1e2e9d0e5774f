"""What a caller says of the form of answers and arguments, in OpenAI's shapes, checked."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .checks import read_json, read_text, read_word
from .schema import check_schema
from .typescript import Function, compact_json

# Requests may come from anybody: what is larger is refused, before it is compiled.
MOST_LETTERS = 1 << 18  # of a schema, a regex or a grammar
MOST_LEVELS = 100  # of lists and objects within each other, in a schema

ANY_OBJECT: dict[str, Any] = {"type": "object"}
NO_ARGUMENTS: dict[str, Any] = {**ANY_OBJECT, "additionalProperties": False}
SYNTAXES = ("regex", "lark")
SHAPES = (
    '{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": '
    '..., "schema": ...}} or {"type": "grammar", "syntax": "regex" or "lark", "definition": ...}'
)


@dataclass(frozen=True)
class ResponseFormat:
    """What an answer must be: of syntax json the `schema` tells, of regex and lark the
    `definition`. `name` and `description` are for the model."""

    syntax: str
    schema: Mapping[str, Any]
    definition: str = ""
    name: str = ""
    description: str = ""


def read_response_format(response_format: object) -> ResponseFormat | None:
    """None for {"type": "text"} and None: an answer may be anything.

    {"type": "json_object"}: any object. {"type": "json_schema", "json_schema": {"name": ...,
    "description": ..., "schema": ..., "strict": ...}}: what the schema says, strict or not.
    {"type": "grammar", "syntax": "regex" or "lark", "definition": ...}: what a regular expression
    matches as a whole, or a grammar in llguidance's variant of Lark. Raises InputError that names
    the field.
    """
    where = "response_format"
    if response_format is None:
        return None
    found = response_format if isinstance(response_format, Mapping) else {}
    match found.get("type"):
        case "text":
            _check_fields(where, found, ("type",))
            return None
        case "json_object":
            _check_fields(where, found, ("type",))
            return ResponseFormat("json", ANY_OBJECT, name="json_object")
        case "json_schema" if isinstance(found.get("json_schema"), Mapping):
            _check_fields(where, found, ("type", "json_schema"))
            return _read_json_schema(f"{where}.json_schema", found["json_schema"])
        case "grammar":
            _check_fields(where, found, ("type", "syntax", "definition"))
            return _read_grammar(where, found)
    raise InputError(f"{where}: expected {SHAPES}, found {response_format!r:.100}")


def response_format_text(response_format: object) -> str:
    """The section of a developer message that asks for JSON; "" where none is asked for: nobody
    tells the model of a regex or a grammar but its user. Raises InputError."""
    found = read_response_format(response_format)
    if found is None or found.syntax != "json":
        return ""
    remark = "".join(f"// {line}\n" for line in found.description.splitlines())
    return f"# Response Formats\n\n## {found.name}\n\n{remark}{compact_json(found.schema)}"


def strict_parameters(
    tools: Sequence[Mapping[str, object]] | None, functions: Sequence[Function]
) -> dict[str, Mapping[str, Any]]:
    """What arguments must be, by the name of each function whose definition is strict. `functions`:
    what was read of the tools. Raises InputError."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for i, (tool, function) in enumerate(zip(tools or (), functions, strict=True)):
        described: Any = tool["function"]
        where = f"tools[{i}].function"
        if _read_strict(f"{where}.strict", described.get("strict")):
            parameters = function.parameters or NO_ARGUMENTS
            _check_root(f"{where}.parameters", parameters)
            schemas[function.name] = _object_schema(f"{where}.parameters", parameters)
    return schemas


def _check_fields(where: str, found: Mapping[str, object], known: Sequence[str]) -> None:
    """What is not known would not be obeyed."""
    for key, value in found.items():
        if key not in known and value is not None:
            raise InputError(
                f"{where}: expected {', '.join(known)}, found {key!r:.100}; a schema is given as "
                '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}'
            )


def _read_json_schema(where: str, described: Mapping[str, object]) -> ResponseFormat:
    _check_fields(where, described, ("name", "description", "schema", "strict"))
    name = read_word(f"{where}.name", described.get("name"))
    description = read_text(f"{where}.description", described.get("description"))
    schema = read_json(f"{where}.schema", described.get("schema"))
    _read_strict(f"{where}.strict", described.get("strict"))
    if name is None or not isinstance(schema, Mapping):
        raise InputError(f"{where}: expected a name and a schema, found {described!r:.100}")
    _check_root(f"{where}.schema", schema)
    check_schema(f"{where}.schema", schema)
    return ResponseFormat("json", schema, name=name, description=description or "")


def _read_grammar(where: str, found: Mapping[str, object]) -> ResponseFormat:
    syntax = found.get("syntax")
    if not isinstance(syntax, str) or syntax not in SYNTAXES:
        raise InputError(
            f"{where}.syntax: expected one of {', '.join(SYNTAXES)}, found {syntax!r:.100}"
        )
    definition = read_text(f"{where}.definition", found.get("definition"))
    if not definition:
        raise InputError(f"{where}.definition: expected a {syntax}, found {definition!r}")
    _check_length(f"{where}.definition", definition)
    return ResponseFormat(syntax, {}, definition)


def _read_strict(where: str, value: object) -> bool:
    """Truth values, which some clients write as text."""
    known = {None: False, False: False, True: True, "true": True, "false": False}
    if not isinstance(value, bool | str | None) or value not in known:
        raise InputError(f"{where}: expected true or false, found {value!r:.100}")
    return known[value]


def _object_schema(where: str, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of parameters, which are those of an object also where they do not say so."""
    kinds = parameters.get("type") or "object"
    if kinds != "object" and "object" not in (kinds if isinstance(kinds, list) else ()):
        raise InputError(f"{where}.type: expected object, found {kinds!r:.100}")
    return {**parameters, "type": "object"}


def _check_root(where: str, schema: Mapping[str, Any]) -> None:
    """Raises InputError for what holds a schema and is none, and for one that is too large."""
    for key in ("schema", "json_schema"):
        if isinstance(schema.get(key), dict):
            raise InputError(
                f"{where}: expected a JSON schema, found one within another; give what is in its "
                f"{key!r}"
            )
    levels, level = 0, [schema]
    while level := [value for value in level if isinstance(value, dict | list)]:
        levels += 1
        values = (v.values() if isinstance(v, dict) else v for v in level)
        level = list(itertools.chain.from_iterable(values))
    if levels > MOST_LEVELS:
        raise InputError(f"{where}: expected at most {MOST_LEVELS} levels, found {levels}")
    _check_length(where, compact_json(schema))


def _check_length(where: str, text: str) -> None:
    if len(text) > MOST_LETTERS:
        raise InputError(f"{where}: expected at most {MOST_LETTERS} letters, found {len(text)}")
