"""Messages -> the ids of a prompt, by a checkpoint's own chat template instead of our renderer."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..tokenizer import Tokenizer
from .checks import need_text, read_json
from .header import FUNCTIONS
from .marks import Marks, choose_mark
from .messages import Message, read_messages
from .render import IDENTITY, check_effort
from .sandbox import run_template
from .structured import response_format_text
from .tools import read_builtin_tools, read_tools
from .typescript import Function

SPECIAL_NAMES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|return|>",
    "pad_token": "<|endoftext|>",
}


def render_template(
    template: str,
    messages: Sequence[Mapping[str, object]],
    tokenizer: Tokenizer,
    *,
    reasoning: str = "medium",
    current_date: str | None = None,
    identity: str = IDENTITY,
    builtin_tools: Sequence[str] = (),
    tools: Sequence[Mapping[str, object]] = (),
    response_format: Mapping[str, object] | None = None,
) -> list[int]:
    """Prompt ids of a conversation, as `template`, in the language of jinja, writes it.

    The arguments are those of `render_chat`, and mean what the template makes of them. It is given
    what transformers would give it: messages, tools, builtin_tools, model_identity,
    reasoning_effort, add_generation_prompt, the names of special tokens, and strftime_now, which
    tells `current_date`. Each call is a message of its own, its arguments an object where they are
    JSON; reasoning is `thinking` of the message after it; instructions at the start are one
    message, at whose end a response format stands.

    Special tokens in what the template writes become special tokens; text of a request never does:
    see Marks. Raises InputError for messages and options of another form, and for what the template
    refuses or fails at; also without jinja2.
    """
    check_effort(reasoning)
    functions = read_tools(tools)
    conversation = read_messages(messages, frozenset(f.name for f in functions))
    asked = {
        "messages": _messages(conversation, response_format_text(response_format)),
        "tools": [_tool(function) for function in functions] or None,
        "builtin_tools": [tool.name for tool in read_builtin_tools(builtin_tools)],
        "model_identity": need_text("identity", identity),
        "reasoning_effort": reasoning,
    }
    marks = Marks(choose_mark(template, asked), frozenset(tokenizer.special))
    variables = {
        **marks.put(asked),
        **SPECIAL_NAMES,
        "add_generation_prompt": True,
        "strftime_now": _clock(current_date),
    }
    ids: list[int] = []
    for text, is_special in marks.split(run_template(template, marks, variables)):
        ids += [tokenizer.special[text]] if is_special else tokenizer.encode(text)
    return ids


def begun_answer(prompt: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """What a prompt has of the answer already: the ids after its last `<|start|>assistant`. Raises
    InputError without that, because what follows would be no answer in this format."""
    start, role = tokenizer.special["<|start|>"], tokenizer.encode("assistant")
    at = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] == start), len(prompt))
    begun = list(prompt[at + 1 :])
    if begun[: len(role)] != role:
        raise InputError(
            "template: expected a prompt that ends with <|start|>assistant, found "
            f"{tokenizer.decode(prompt[-8:])!r} at its end; chat without the checkpoint's template"
        )
    return begun[len(role) :]


def _messages(conversation: Sequence[Message], response_format: str) -> list[dict[str, Any]]:
    roles = [message.role for message in conversation]
    others = [i for i, role in enumerate(roles) if role not in ("system", "developer")]
    num_leading = others[0] if others else len(roles)
    texts = ["".join(message.content) for message in conversation[:num_leading]]
    instructions = "\n\n".join(text for text in [*texts, response_format] if text)
    role = roles[0] if num_leading else "system"
    made: list[dict[str, Any]] = [{"role": role, "content": instructions}] if instructions else []
    thinking: list[str] = []  # waits for the message that came of it
    for message in conversation[num_leading:]:
        said: dict[str, Any] = {"role": message.role}
        content = "".join(message.content)
        if message.role != "assistant":
            thinking = []
            name = (message.name or "").removeprefix(FUNCTIONS)
            said |= {"name": name} if name else {}
        elif message.channel == "analysis" and message.recipient is None:
            thinking.append(content)
            continue
        elif thinking:
            said["thinking"], thinking = "\n".join(thinking), []
        if message.role == "assistant" and message.recipient is not None:
            name = message.recipient.removeprefix(FUNCTIONS)
            function = {"name": name, "arguments": _arguments(content)}
            said["tool_calls"] = [{"type": "function", "function": function}]
        else:
            said["content"] = content
        made.append(said)
    return made


def _arguments(text: str) -> object:
    """The object that arguments stand for, else the text."""
    try:
        value = read_json("arguments", json.loads(text))
    except (ValueError, RecursionError):  # not JSON, or not what can be encoded
        return text
    return value if isinstance(value, dict) else text


def _tool(function: Function) -> dict[str, object]:
    described: dict[str, object] = {"name": function.name, "description": function.description}
    if function.parameters is not None:
        described["parameters"] = function.parameters
    return {"type": "function", "function": described}


def _clock(current_date: str | None) -> Callable[[str], str]:
    """What templates call strftime_now: this time of day, on the date that was asked for."""
    try:
        date = None if current_date is None else datetime.date.fromisoformat(current_date)
    except (TypeError, ValueError):
        raise InputError(
            f"current_date: expected YYYY-MM-DD or None, found {current_date!r:.100}"
        ) from None

    def strftime_now(form: str) -> str:
        if date is None:
            raise InputError(
                "current_date: expected a date, because this template writes it, found None"
            )
        return datetime.datetime.combine(date, datetime.datetime.now().time()).strftime(form)

    return strftime_now
