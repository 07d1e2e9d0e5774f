"""Items of the Responses API -> messages of the chat API, which the engine takes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
MESSAGE = re.compile(r"messages\[(\d+)\]\.?([\w.\[\]]*)")  # how the engine names a field
FIELDS = {
    "tool_call_id": "call_id",
    "tool_calls[0].id": "call_id",
    "tool_calls[0].function.name": "name",
    "tool_calls[0].function.arguments": "arguments",
}
CHANNELS = {"commentary": "commentary", "final_answer": "final", None: None}  # by phase


def read_input(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages, of a text or of items: messages, reasoning, calls of functions and their results.

    Raises InputError that names input[i]; what is within a message, the engine checks: see
    `as_sent`.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [m for i, item in enumerate(given) for m in _read_item(f"input[{i}]", item)]


def as_sent(
    error: InputError, given: str | Sequence[Mapping[str, Any]], num_before: int
) -> InputError:
    """The error of an engine that was given `num_before` other messages first, with the name that a
    field of the input has there."""
    found = MESSAGE.match(str(error))
    if found is None or isinstance(given, str):
        return error
    items = [i for i, item in enumerate(given) for _ in _read_item("", item)]
    place = int(found[1]) - num_before
    if not 0 <= place < len(items):
        return error
    kind, field = given[items[place]].get("type"), found[2]
    field = "output" if (kind, field) == ("function_call_output", "content") else field
    where = f"input[{items[place]}].{FIELDS.get(field, field)}"
    return InputError(f"{where.removesuffix('.')}{str(error)[found.end() :]}")


def _read_item(where: str, item: Mapping[str, Any]) -> list[dict[str, Any]]:
    kind = item.get("type", "message")
    if kind == "message":
        return [_read_message(where, item)]
    if kind == "reasoning":
        text = _read_parts(f"{where}.content", item.get("content") or item.get("summary") or "")
        return [{"role": "assistant", "reasoning": text}] if text else []
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]
    if kind == "function_call_output":
        output = _read_parts(f"{where}.output", item.get("output"))
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": output}]
    raise InputError(
        f"{where}.type: expected message, reasoning, function_call or function_call_output, "
        f"found {kind!r:.100}"
    )


def _read_message(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    message = {"role": item.get("role")}
    phase = item.get("phase")
    if not isinstance(phase, str | None) or phase not in CHANNELS:
        raise InputError(
            f"{where}.phase: expected commentary or final_answer, found {phase!r:.100}"
        )
    content = item.get("content")
    if message["role"] == "assistant":
        message["channel"] = CHANNELS[phase]
    return message | {"content": _read_parts(f"{where}.content", content)}


def _read_parts(where: str, content: Any) -> Any:
    """Text, of text parts; what is neither a text nor a list is left to the engine to refuse."""
    if not isinstance(content, list):
        return content
    return "".join(_read_part(f"{where}[{i}]", part) for i, part in enumerate(content))


def _read_part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = None
    if kind in TEXT_PARTS:
        text = part.get("text")
    elif kind == "refusal":
        text = part.get("refusal")
    if not isinstance(text, str):
        raise InputError(
            f'{where}: expected {{"type": "input_text", "text": ...}}, found a part of type '
            f"{kind!r:.100}; this model reads text only"
        )
    return text
