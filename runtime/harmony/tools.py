"""Tools in OpenAI's shapes -> what the renderer tells the model of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import InputError
from .builtin_tools import BUILTIN_TOOLS
from .checks import read_json, read_text, read_word
from .header import LONGEST_NAME, is_name
from .schema import check_schema
from .typescript import Function, Namespace, tools_text


def read_tools(tools: object) -> tuple[Function, ...]:
    """Functions, each {"type": "function", "function": {"name": ..., "description": ...,
    "parameters": a JSON schema}}, the last two optional. Raises InputError that names tools[i]."""
    functions = [
        _read_tool(f"tools[{i}]", tool) for i, tool in enumerate(_read_list("tools", tools))
    ]
    names: set[str] = set()
    for i, function in enumerate(functions):
        if function.name in names:
            raise InputError(
                f"tools[{i}].function.name: expected a name of its own, "
                f"found {function.name!r} twice"
            )
        names.add(function.name)
    return tuple(functions)


def read_builtin_tools(names: object) -> tuple[Namespace, ...]:
    """Those of browser and python that `names` holds, in this order; a dict gives each a
    description of its own, or None for that of the training. Raises InputError."""
    found = names if isinstance(names, Mapping) else _read_list("builtin_tools", names)
    for name in found:
        if not isinstance(name, str) or name not in BUILTIN_TOOLS:
            raise InputError(
                f"builtin_tools: expected some of {', '.join(BUILTIN_TOOLS)}, found {name!r}"
            )
    tools = [tool for name, tool in BUILTIN_TOOLS.items() if name in found]
    if not isinstance(names, Mapping):
        return tuple(tools)
    described = {name: read_text(f"builtin_tools.{name}", text) for name, text in names.items()}
    return tuple(
        replace(tool, description=described[tool.name] or tool.description) for tool in tools
    )


def check_apart(functions: Sequence[Function], builtin_tools: Sequence[Namespace]) -> None:
    """Raises InputError for a function whose calls nobody could tell from a builtin tool's."""
    taken = {tool.name for tool in builtin_tools}
    for function in functions:
        if function.name.partition(".")[0] in taken:
            raise InputError(
                f"tools: expected other names than the builtin tools', found {function.name!r}; "
                "rename the function, or leave the builtin tool out"
            )


def functions_text(functions: Sequence[Function]) -> str:
    """The section of a developer message that declares functions; "" if there are none."""
    if not functions:
        return ""
    try:
        return tools_text([Namespace("functions", "", tuple(functions))])
    except RecursionError:
        raise InputError(
            "tools: expected schemas nested a hundred levels at most, found more"
        ) from None


def _read_tool(where: str, tool: object) -> Function:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or kind != "function":
        raise InputError(
            f'{where}: expected {{"type": "function", "function": {{"name": ..., "description": '
            f'..., "parameters": ...}}}}, found {tool!r:.100}'
        )
    where = f"{where}.function"
    name = read_word(f"{where}.name", function.get("name"))
    if name is None:
        raise InputError(f"{where}.name: expected the name of the function, found none")
    if not is_name(name):
        raise InputError(
            f"{where}.name: expected at most {LONGEST_NAME} bytes without brackets and quotes, "
            f"found {name!r:.100}; a call of it could not be told"
        )
    description = read_text(f"{where}.description", function.get("description"))
    parameters = read_json(f"{where}.parameters", function.get("parameters"))
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InputError(f"{where}.parameters: expected a JSON schema, found {parameters!r:.100}")
    check_schema(f"{where}.parameters", parameters or {})
    return Function(name, description or "", parameters)


def _read_list(where: str, values: object) -> Sequence[object]:
    if values is None:
        return ()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise InputError(f"{where}: expected a list, found {type(values).__name__}")
    return values
