"""Conversations as people have them -> harmony's messages, each checked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError
from .builtin_tools import is_builtin
from .checks import read_text, read_word
from .header import FUNCTIONS

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
# What an answer may have said, and no prompt has a place for. Whatever else servers and SDKs write
# beside answers is left out, e.g. annotations; a person who wrote a message meant all of it.
SAID_ELSEWHERE = ("audio", "function_call")
KEYS = {
    "system": ("content", "name"),
    "developer": ("content", "name"),
    "user": ("content", "name"),
    "assistant": ("content", "name", "channel", "tool_calls", "refusal", *REASONING_KEYS),
    "tool": ("content", "name", "tool_call_id"),
}


@dataclass(frozen=True)
class Message:
    """A message of the format. content: its parts, each encoded on its own. name: of who speaks,
    for a tool its whole name. constrained: its content type is one that sampling keeps to."""

    role: str
    content: tuple[str, ...]
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    constrained: bool = False


def read_messages(
    messages: Sequence[Mapping[str, object]], functions: frozenset[str] = frozenset()
) -> list[Message]:
    """Messages in the shapes of OpenAI's chat API, one or several of harmony's for each.

    - role: system, developer, user, assistant or tool; name: of who speaks, without blanks (that of
      a system or developer message is left out);
    - content: text, or a list of parts {"type": "text", "text": ...}; an assistant's may be None or
      without parts: an empty answer, unless something else was said;
    - assistant: reasoning (also as reasoning_content or thinking), tool_calls, refusal; channel: of
      the content, or of the calls if there is none (default: final, and commentary before calls);
    - tool: tool_call_id, that of an earlier call, or the name of the function.

    functions: the names of those declared, which a builtin tool's name may be among. Raises
    InputError that names messages[i] and the field.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            "messages: expected a list of dicts such as "
            f'{{"role": "user", "content": "Hello"}}, found {type(messages).__name__}'
        )
    if not messages:
        raise InputError("messages: expected at least one message, found an empty list")
    reader = _Reader(functions)
    return [m for i, message in enumerate(messages) for m in reader.read(f"messages[{i}]", message)]


@dataclass(frozen=True)
class _Author:
    """Who makes the calls in a message; channel: theirs, if it says one."""

    name: str | None
    channel: str | None


class _Reader:
    """Remembers the calls, so that results find the name and the channel of theirs."""

    def __init__(self, functions: frozenset[str]) -> None:
        self._functions = functions
        self._calls: dict[str, Message] = {}

    def read(self, where: str, message: Mapping[str, object]) -> list[Message]:
        if not isinstance(message, Mapping):
            raise InputError(
                f'{where}: expected a dict with "role" and "content", '
                f"found {type(message).__name__}"
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"{where}.role: expected one of {', '.join(ROLES)}, found {role!r}")
        _check_keys(where, message, role)
        name = read_word(f"{where}.name", message.get("name"))
        if role == "assistant":
            return self._read_assistant(where, message, name)
        content = _read_content(where, message.get("content"), role)
        if content is None:
            raise InputError(f"{where}.content: expected text, found none")
        if role == "tool":
            return [self._read_result(where, message, content, name)]
        return [Message(role, content, name if role == "user" else None)]

    def _read_assistant(
        self, where: str, message: Mapping[str, object], name: str | None
    ) -> list[Message]:
        content = _read_content(where, message.get("content"), "assistant")
        refusal = read_text(f"{where}.refusal", message.get("refusal"))
        if refusal:
            content = (*(content or ()), refusal)
        reasoning = _read_reasoning(where, message)
        channel = read_word(f"{where}.channel", message.get("channel"))
        is_said = content is not None and any(content)
        author = _Author(name, None if is_said else channel)
        calls = self._read_calls(f"{where}.tool_calls", message.get("tool_calls"), author)
        if content is None and not reasoning and not calls:
            if "content" not in message:
                raise InputError(
                    f"{where}.content: expected text where there are no tool_calls and no "
                    "reasoning, found none"
                )
            content = ("",)  # how SDKs give an answer that was cut before it said anything
        said = [Message("assistant", (reasoning,), name, "analysis")] if reasoning else []
        if content is not None and (is_said or not calls):
            default = "commentary" if calls else "final"
            said.append(Message("assistant", content, name, channel or default))
        return [*said, *calls]

    def _read_calls(self, where: str, calls: object, author: "_Author") -> list[Message]:
        if calls is None:
            return []
        if isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Sequence):
            raise InputError(f"{where}: expected a list of calls, found {type(calls).__name__}")
        return [self._read_call(f"{where}[{i}]", call, author) for i, call in enumerate(calls)]

    def _read_call(self, where: str, call: object, author: "_Author") -> Message:
        function = call.get("function") if isinstance(call, Mapping) else None
        kind = (call.get("type") or "function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or kind != "function":
            raise InputError(
                f'{where}: expected {{"id": ..., "type": "function", "function": {{"name": ..., '
                f'"arguments": ...}}}}, found {call!r:.100}'
            )
        id = read_text(f"{where}.id", call.get("id"))
        called = read_word(f"{where}.function.name", function.get("name"))
        if called is None:
            raise InputError(f"{where}.function.name: expected the name of a function, found none")
        arguments = (_read_arguments(f"{where}.function.arguments", function.get("arguments")),)
        name, channel = author.name, author.channel
        recipient = self._full_name(called)
        if is_builtin(recipient):
            channel = channel or "analysis"
            message = Message("assistant", arguments, name, channel, recipient, "code")
        else:
            channel = channel or "commentary"
            message = Message("assistant", arguments, name, channel, recipient, "json", True)
        if id is not None:
            self._calls[id] = message
        return message

    def _read_result(
        self,
        where: str,
        message: Mapping[str, object],
        content: tuple[str, ...],
        name: str | None,
    ) -> Message:
        id = read_text(f"{where}.tool_call_id", message.get("tool_call_id"))
        call = self._calls.get(id) if id is not None else None
        if call is not None:
            return Message("tool", content, call.recipient, call.channel, "assistant")
        if name is None:
            raise InputError(
                f"{where}.tool_call_id: expected the id of a call in a message before this one, "
                f"found {id!r}; or give the name of the function as name"
            )
        full_name = self._full_name(name)
        channel = "analysis" if is_builtin(full_name) else "commentary"
        return Message("tool", content, full_name, channel, "assistant")

    def _full_name(self, name: str) -> str:
        is_full = name.startswith(FUNCTIONS) or is_builtin(name)
        return name if is_full and name not in self._functions else f"{FUNCTIONS}{name}"


def _check_keys(where: str, message: Mapping[str, object], role: str) -> None:
    known = ("role", *KEYS[role])
    for key, value in message.items():
        is_beside = role == "assistant" and key not in SAID_ELSEWHERE
        if key in known or value is None or is_beside:
            continue
        raise InputError(  # leaving it out silently would change what the user means
            f"{where}.{key}: expected the keys {', '.join(known)} only in a message of role "
            f"{role}; leave it out"
        )


def _read_content(where: str, content: object, role: str) -> tuple[str, ...] | None:
    """The parts of the content; None where there is none."""
    if content is None or isinstance(content, str):
        text = read_text(f"{where}.content", content)
        return None if text is None else (text,)
    if not isinstance(content, list | tuple):
        raise InputError(
            f"{where}.content: expected text or a list of text parts, "
            f"found {type(content).__name__}"
        )
    if not content:
        return None
    return tuple(_read_part(f"{where}.content[{i}]", part, role) for i, part in enumerate(content))


def _read_part(where: str, part: object, role: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = "refusal" if kind == "refusal" and role == "assistant" else "text"
    if not isinstance(part, Mapping) or kind != key:
        found = f"a part of type {kind!r}" if isinstance(part, Mapping) else type(part).__name__
        raise InputError(
            f'{where}: expected {{"type": "text", "text": ...}}, found {found}; '
            "this model reads text only"
        )
    text = read_text(f"{where}.{key}", part.get(key))
    if text is None:
        raise InputError(f"{where}.{key}: expected text, found none")
    return text


def _read_reasoning(where: str, message: Mapping[str, object]) -> str | None:
    """The reasoning, which servers name differently, and some twice."""
    found = {
        text: key
        for key in REASONING_KEYS
        if (text := read_text(f"{where}.{key}", message.get(key)))
    }
    if len(found) > 1:
        raise InputError(
            f"{where}: expected one reasoning, found different ones as "
            f"{' and '.join(found.values())}; leave out all but one"
        )
    return next(iter(found), None)


def _read_arguments(where: str, arguments: object) -> str:
    """Text as the model wrote it, which need not be JSON, or the dict that it stands for."""
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected what JSON can say, found {error}") from None
    return read_text(where, arguments) or ""
