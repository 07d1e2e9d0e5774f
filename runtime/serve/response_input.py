"""Items of the Responses API -> messages of the chat API, which the engine takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
CHANNELS = {"commentary": "commentary", "final_answer": "final", None: None}  # by phase


def read_input(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages, of a text or of items: messages, reasoning, calls of functions and their results.

    Raises InputError that names input[i]; what is within a message, the engine checks.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [m for i, item in enumerate(given) for m in _read_item(f"input[{i}]", item)]


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
