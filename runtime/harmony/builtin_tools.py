"""The tools that the models were trained to use: browser and python, in the words of their training
(openai-harmony's, Apache License 2.0), any change of which would be read as another tool."""

from .typescript import Function, Namespace


def _parameters(*required: str, **properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": [*required]}


def _optional(kind: str | list[str], default: object) -> dict[str, object]:
    return {"type": kind, "default": default}


_SEARCH = Function(
    "search",
    "Searches for information related to `query` and displays `topn` results.",
    _parameters(
        "query",
        query={"type": "string"},
        topn=_optional("number", 10),
        source={"type": "string"},
    ),
)
_OPEN = Function(
    "open",
    "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, "
    "showing `num_lines` lines.\n"
    "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
    "If `cursor` is not provided, the most recent page is implied.\n"
    "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
    "If `loc` is not provided, the viewport will be positioned at the beginning of the document "
    "or centered on the most relevant passage, if available.\n"
    "Use this function without `id` to scroll to a new location of an opened page.",
    _parameters(
        id=_optional(["number", "string"], -1),
        cursor=_optional("number", -1),
        loc=_optional("number", -1),
        num_lines=_optional("number", -1),
        view_source=_optional("boolean", False),
        source={"type": "string"},
    ),
)
_FIND = Function(
    "find",
    "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
    _parameters("pattern", pattern={"type": "string"}, cursor=_optional("number", -1)),
)


def python_description(seconds: float = 120.0, drive: str = "/mnt/data") -> str:
    """What the model is told of the tool python, with the limit and the folder of its training."""
    return (
        "Use this tool to execute Python code in your chain of thought. The code will not be "
        "shown to the user. This tool should be used for internal reasoning, but not for code "
        "that is intended to be visible to the user (e.g. when creating plots, tables, or "
        "files).\n\n"
        "When you send a message containing Python code to python, it will be executed in a "
        "stateful Jupyter notebook environment. python will respond with the output of the "
        f"execution or time out after {seconds:.1f} seconds. The drive at '{drive}' can be used "
        "to save and persist user files. Internet access for this session is UNKNOWN. Depends on "
        "the cluster."
    )


BUILTIN_TOOLS = {
    "browser": Namespace(
        "browser",
        "Tool for browsing.\n"
        "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
        "Cite information from the tool using the following format:\n"
        "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
        "Do not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)",
        (_SEARCH, _OPEN, _FIND),
    ),
    "python": Namespace("python", python_description()),
}


def is_builtin(name: str) -> bool:
    """Whether a call of this name is one of a tool above, e.g. python or browser.search."""
    return name.partition(".")[0] in BUILTIN_TOOLS
