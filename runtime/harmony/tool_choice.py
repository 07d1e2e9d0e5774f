"""A choice of tools -> which messages an answer may have: headers of others cannot be said."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..constraint import Constraint, is_allowed, mask_of
from ..errors import InputError
from ..tokenizer import Tokenizer
from .header import FUNCTIONS
from .typescript import Function, Namespace

Ids = tuple[int, ...]


@dataclass(frozen=True)
class ToolChoice:
    """What an answer may come to, after any reasoning: `calls` of these recipients, or what is said
    to the user if it `answers`."""

    calls: frozenset[str]
    answers: bool


def read_tool_choice(
    choice: object, functions: Sequence[Function], builtin_tools: Sequence[Namespace]
) -> ToolChoice | None:
    """A choice in OpenAI's form; None for auto. Raises InputError.

    none: it reasons and answers, and calls nothing. required, or {"type": "function", "function":
    {"name": ...}}: it may reason, and tell the user what it is about to do, until it calls one of
    the tools, or this function; it ends with the call.
    """
    if choice is None or choice == "auto":
        return None
    if choice == "none":
        return ToolChoice(frozenset(), answers=True)
    name = None if choice == "required" else _read_name(choice, functions)
    if not functions and not builtin_tools:
        raise InputError(f"tool_choice: expected tools beside {choice!r:.100}, found none")
    calls = [function_recipient(f.name) for f in functions if name in (None, f.name)]
    for tool in builtin_tools if name is None else ():
        calls += builtin_recipients(tool)
    return ToolChoice(frozenset(calls), answers=False)


def function_recipient(name: str) -> str:
    return f"{FUNCTIONS}{name}"


def builtin_recipients(tool: Namespace) -> list[str]:
    return [f"{tool.name}.{f.name}" for f in tool.functions] or [tool.name]


def tool_constraint(
    choice: ToolChoice, tokenizer: Tokenizer, vocab_size: int, begun: Sequence[int] = ()
) -> Constraint:
    """What keeps an answer to a choice. `begun`: ids of the answer that its prompt has. Raises
    InputError."""
    headers = _Headers(tokenizer)
    allowed = {**headers.text("analysis", "<|end|>"), **headers.text("commentary", "<|end|>")}
    if choice.answers:
        allowed |= headers.text("final", "<|return|>", "<|endoftext|>")
    for recipient in sorted(choice.calls):
        is_function = recipient.startswith(FUNCTIONS)
        channel = "commentary" if is_function else "analysis"
        allowed |= headers.call(recipient, channel, is_json=is_function)
    constraint = _Messages(allowed, tokenizer, vocab_size)
    for id in begun:
        if not is_allowed(constraint.mask(), vocab_size)[id]:
            raise InputError(
                f"tool_choice: expected a template that leaves the answer's beginning to the "
                f"model, found one that says {tokenizer.decode(begun)!r:.100}; chat without the "
                "checkpoint's template"
            )
        constraint.push(id)
    return constraint


def _read_name(choice: object, functions: Sequence[Function]) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind != "function" or not isinstance(name, str):
        raise InputError(
            'tool_choice: expected auto, none, required or {"type": "function", "function": '
            f'{{"name": ...}}}}, found {choice!r:.100}'
        )
    names = [function.name for function in functions]
    if name not in names:
        known = ", ".join(names) or "none"
        raise InputError(f"tool_choice: expected one of the tools ({known}), found {name!r:.100}")
    return name


class _Headers:
    """Headers after `<|start|>assistant`, as ids up to `<|message|>`, with the ids that may end
    the message."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special, self._encode = tokenizer.special, tokenizer.encode

    def text(self, channel: str, *ends: str) -> dict[Ids, Ids]:
        return dict([self._header(("<|channel|>", channel), ends)])

    def call(self, recipient: str, channel: str, is_json: bool) -> dict[Ids, Ids]:
        """Models write the recipient before or after the channel."""
        kind = (" ", "<|constrain|>", "json") if is_json else (" code",)
        to = f" to={recipient}"
        before, after = (to, "<|channel|>", channel, *kind), ("<|channel|>", channel + to, *kind)
        return dict([self._header(parts, ("<|call|>",)) for parts in (before, after)])

    def _header(self, parts: Sequence[str], ends: Sequence[str]) -> tuple[Ids, Ids]:
        special = self._special
        ids = [id for part in (*parts, "<|message|>") for id in self._ids(part)]
        return tuple(ids), tuple(special[end] for end in ends)

    def _ids(self, part: str) -> list[int]:
        return [self._special[part]] if part in self._special else self._encode(part)


class _Messages:
    """A constraint: every message has one of these headers, and ordinary text up to one of the ids
    that may end it; after `<|end|>` another follows."""

    error = None

    def __init__(self, headers: Mapping[Ids, Ids], tokenizer: Tokenizer, vocab_size: int) -> None:
        start = (tokenizer.special["<|start|>"], *tokenizer.encode("assistant"))
        self._next = [((*start, *header), ends) for header, ends in headers.items()]
        # Within a header: what may be left of it, with the ends of its message; else empty.
        self._left = list(headers.items())
        self._end = tokenizer.special["<|end|>"]
        self._vocab_size = vocab_size
        text = np.ones(vocab_size, np.bool_)
        text[[id for id in tokenizer.special.values() if id < vocab_size]] = False
        self._text = self._content = mask_of(text)

    def mask(self) -> NDArray[np.uint32]:
        if self._left:
            return self._only(ids[0] for ids, _ in self._left)
        return self._content

    def push(self, token_id: int) -> None:
        if not self._left:
            self._left = self._next if token_id == self._end else []
            return
        self._left = [(ids[1:], ends) for ids, ends in self._left if ids[0] == token_id]
        whole = next((ends for ids, ends in self._left if not ids), None)
        if whole is not None:  # `<|message|>`, with which no other header goes on
            self._left, self._content = [], self._text | self._only(whole)

    def _only(self, ids: Iterable[int]) -> NDArray[np.uint32]:
        allowed = np.zeros(self._vocab_size, np.bool_)
        allowed[list(ids)] = True
        return mask_of(allowed)
