"""Functions that a model may call -> the TypeScript that tells it of them.

The models were trained on what openai-harmony writes, so this writes the same to the byte, with its
oddities: anyOf is `any`, and only some places quote a default or name a description.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from typing import Any


@dataclass(frozen=True)
class Function:
    """parameters: a JSON schema of JSON's own types; None: it takes none."""

    name: str
    description: str
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Namespace:
    """Functions that are called as `name.function`; without functions, a tool that reads text."""

    name: str
    description: str
    functions: tuple[Function, ...] = ()


def tools_text(namespaces: Sequence[Namespace]) -> str:
    """The section `# Tools` of a system or developer message."""
    return "\n\n".join(["# Tools", *map(_namespace_text, namespaces)])


def type_text(schema: object, indent: str = "") -> str:
    """The TypeScript type of a JSON schema."""
    fields = _fields(schema)
    variants, kind = fields.get("oneOf"), fields.get("type")
    if isinstance(variants, list):
        return "".join(
            f"\n{indent} | {_nullable_text(v, indent + '   ')}{_remarks(v, json_enum=True)}"
            for v in variants
        )
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in _strings(kind)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object_text(fields, indent)
    if kind == "array":
        return type_text(fields["items"], indent) + "[]" if "items" in fields else "Array<any>"
    if kind == "string":
        return " | ".join(f'"{value}"' for value in _strings(fields.get("enum"))) or "string"
    if kind in ("number", "integer"):
        return "number"
    return "boolean" if kind == "boolean" else "any"


def compact_json(value: object) -> str:
    """JSON without spaces, its numbers written as Rust writes them."""
    if isinstance(value, Mapping):
        items = (f"{dumps(k, ensure_ascii=False)}:{compact_json(v)}" for k, v in value.items())
        return f"{{{','.join(items)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(compact_json, value))}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return dumps(value, ensure_ascii=False)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return str(value)
    return _float_text(float(value))


def _namespace_text(namespace: Namespace) -> str:
    name = namespace.name
    lines = [f"## {name}\n"]
    if not namespace.functions:
        return "\n".join([*lines, *_lines(namespace.description)])
    lines += [f"// {line}" for line in _lines(namespace.description)]
    lines.append(f"namespace {name} {{\n")
    for function in namespace.functions:
        lines += [f"// {line}" for line in _lines(function.description)]
        parameters = function.parameters
        takes = "" if parameters is None else f"_: {type_text(parameters)}"
        lines.append(f"type {function.name} = ({takes}) => any;\n")
    return "\n".join([*lines, f"}} // namespace {name}"])


def _object_text(fields: Mapping[str, Any], indent: str) -> str:
    description = fields.get("description")
    lines = [f"{indent}// {description}\n"] if isinstance(description, str) else []
    lines.append("{\n")
    required = set(_strings(fields.get("required")))
    for name, schema in _fields(fields.get("properties")).items():
        lines += _comments(_fields(schema), indent)
        label = f"{indent}{name}{'' if name in required else '?'}:"
        if isinstance(_fields(schema).get("oneOf"), list):
            lines += _choice_lines(schema, indent, label)
            continue
        remark = ""
        if "oneOf" not in _fields(schema) and "default" in _fields(schema):
            remark = f" // {_default(schema)}"
        lines.append(f"{label} {_nullable_text(schema, indent + '    ')},{remark}\n")
    return "".join([*lines, f"{indent}}}"])


def _comments(fields: Mapping[str, Any], indent: str) -> list[str]:
    """What stands above a property: its title, description and examples."""
    lines = []
    if isinstance(fields.get("title"), str):
        lines += [f" {fields['title']}", ""]
    if "oneOf" not in fields and isinstance(fields.get("description"), str):
        lines.append(f" {fields['description']}")
    if isinstance(fields.get("examples"), list) and fields["examples"]:
        lines += [" Examples:", *(f' - "{text}"' for text in _strings(fields["examples"]))]
    return [f"{indent}//{line}\n" for line in lines]


def _choice_lines(schema: Mapping[str, Any], indent: str, label: str) -> list[str]:
    """A property of several types, one a line."""
    variants, description = schema["oneOf"], schema.get("description")
    lines = []
    first = _fields(variants[0]).get("description") if variants else None
    is_above = isinstance(description, str) and description != first
    if is_above:
        lines.append(f"{indent}// {description}\n")
    if "default" in schema:
        lines.append(f"{indent}// {_default(schema)}\n")
    lines.append(f"{label}\n")
    for i, variant in enumerate(variants):
        said = (is_above and i == 0) or _fields(variant).get("description") == description
        remarks = _remarks(variant, with_description=not said)
        lines.append(f"{indent} | {_nullable_text(variant, indent + '   ')}{remarks}\n")
    return [*lines, f"{indent},\n"]


def _remarks(schema: object, *, with_description: bool = True, json_enum: bool = False) -> str:
    """What stands behind a type of several."""
    fields = _fields(schema)
    remarks = []
    if with_description and isinstance(fields.get("description"), str):
        remarks.append(fields["description"])
    if "default" in fields:
        remarks.append(_default(fields, json_enum))
    return f" // {' '.join(remarks)}" if remarks else ""


def _default(fields: Mapping[str, Any], json_enum: bool = False) -> str:
    value = fields["default"]
    is_enum = isinstance(fields.get("enum"), list) and fields["enum"]
    if isinstance(value, str) and not is_enum:
        return f'default: "{value}"'
    if isinstance(value, str) and not json_enum:
        return f"default: {value}"
    return f"default: {compact_json(value)}"


def _nullable_text(schema: object, indent: str) -> str:
    text = type_text(schema, indent)
    is_nullable = _fields(schema).get("nullable") is True
    return f"{text} | null" if is_nullable and "null" not in text else text


def _fields(schema: object) -> Mapping[str, Any]:
    """A schema may also be a truth value, and a broken one anything: it says nothing."""
    return schema if isinstance(schema, Mapping) else {}


def _strings(values: object) -> list[str]:
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []


def _lines(text: str) -> list[str]:
    *ended, last = text.split("\n")
    return [line.removesuffix("\r") for line in ended] + ([last] if last else [])


def _float_text(value: float) -> str:
    text = repr(value)
    found = re.fullmatch(r"(-?)(\d)\.?(\d*)e([+-]\d+)", text)
    if found is None:
        return text
    sign, first, more, exponent = found.groups()
    if int(exponent) == -5:
        return f"{sign}0.0000{first}{more}"
    return f"{sign}{first}{'.' if more else ''}{more}e{int(exponent)}"
