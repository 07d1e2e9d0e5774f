"""Messages -> the ids of a prompt.

A message is `<|start|>{role}[:{name}][ to={recipient}][<|channel|>{channel}][ {content type}]
<|message|>`, on one line, its content, and an end token. Special tokens are written by id and all
text is encoded segment by segment, as the models were trained, so no text of a user can become a
special token.
"""

from collections.abc import Mapping, Sequence

from ..errors import InputError
from ..tokenizer import Tokenizer
from .checks import need_text
from .messages import Message, read_messages
from .structured import response_format_text
from .tools import functions_text, read_builtin_tools, read_tools
from .typescript import Namespace, tools_text

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
REASONING_EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")


def render_chat(
    messages: Sequence[Mapping[str, object]],
    tokenizer: Tokenizer,
    *,
    reasoning: str = "medium",
    current_date: str | None = None,
    identity: str = IDENTITY,
    knowledge_cutoff: str = KNOWLEDGE_CUTOFF,
    channels: Sequence[str] = CHANNELS,
    builtin_tools: Sequence[str] = (),
    tools: Sequence[Mapping[str, object]] = (),
    response_format: Mapping[str, object] | None = None,
) -> list[int]:
    """Prompt ids of a conversation, up to and with the `<|start|>assistant` of the answer.

    messages: see `read_messages`; tools, builtin_tools (of browser, python) and response_format:
    see `read_tools`, `response_format_text`.

    Harmony's own system message is generated from `identity`, `knowledge_cutoff`, `current_date`
    (e.g. "2025-06-28"; None: no such line), `reasoning` (low, medium or high), the builtin tools
    and `channels`. What a user calls a system or a developer message gives the developer message's
    instructions: those at the start of the conversation are joined in order, a blank line between
    them, empty ones left out; one further on becomes a developer message of its own at its place.

    Past reasoning is dropped as openai-harmony does: if the last assistant message is final, the
    analysis messages before the first final one are left out.

    Raises InputError for messages or options of another form.
    """
    check_effort(reasoning)
    about = [
        need_text("identity", identity),
        f"Knowledge cutoff: {need_text('knowledge_cutoff', knowledge_cutoff)}",
    ]
    if current_date is not None:
        about.append(f"Current date: {need_text('current_date', current_date)}")
    functions = read_tools(tools)
    conversation = read_messages(messages, frozenset(f.name for f in functions))
    num_leading = next(
        (i for i, m in enumerate(conversation) if m.role not in ("system", "developer")),
        len(conversation),
    )
    leading = ("".join(m.content) for m in conversation[:num_leading])
    system = _system_text(
        about, reasoning, read_builtin_tools(builtin_tools), channels, bool(functions)
    )
    developer = _developer_text(
        "\n\n".join(text for text in leading if text),
        response_format_text(response_format),
        functions_text(functions),
    )
    rendered = [Message("system", (system,))]
    if developer:
        rendered.append(Message("developer", (developer,)))
    for message in conversation[num_leading:]:
        if message.role in ("system", "developer"):
            message = Message("developer", (_developer_text("".join(message.content)),))
        rendered.append(message)
    ids = render_messages(_without_past_analysis(rendered), tokenizer)
    return [*ids, tokenizer.special["<|start|>"], *tokenizer.encode("assistant")]


def render_messages(conversation: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids of messages of the format, all of them."""
    return [id for message in conversation for id in _encode_message(tokenizer, message)]


def check_effort(reasoning: str) -> None:
    """Raises InputError for an effort that there is not."""
    if reasoning not in REASONING_EFFORTS:
        raise InputError(
            f"reasoning: expected one of {', '.join(REASONING_EFFORTS)}, found {reasoning!r}"
        )


def _without_past_analysis(conversation: Sequence[Message]) -> Sequence[Message]:
    channels = [m.channel for m in conversation if m.role == "assistant"]
    if not channels or channels[-1] != "final":  # in the middle of an answer
        return conversation
    first_final = next(i for i, m in enumerate(conversation) if m.channel == "final")
    return [m for i, m in enumerate(conversation) if i >= first_final or m.channel != "analysis"]


def _system_text(
    about: Sequence[str],
    reasoning: str,
    builtin_tools: Sequence[Namespace],
    channels: Sequence[str],
    has_functions: bool,
) -> str:
    sections = ["\n".join(about), f"Reasoning: {reasoning}"]
    if builtin_tools:
        sections.append(tools_text(builtin_tools))
    rule = f"# Valid channels: {', '.join(channels)}. Channel must be included for every message."
    if has_functions:
        rule += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return "\n\n".join([*sections, rule])


def _developer_text(instructions: str, *sections: str) -> str:
    """The developer message, one section per thing that it tells; "" when there is nothing."""
    first = f"# Instructions\n\n{instructions}" if instructions else ""
    return "\n\n".join(section for section in (first, *sections) if section)


def _encode_message(tokenizer: Tokenizer, message: Message) -> list[int]:
    special, encode = tokenizer.special, tokenizer.encode
    ids = [special["<|start|>"]]
    if message.role == "tool":
        ids += encode(message.name or "")
    else:
        ids += encode(message.role)
        ids += encode(f":{message.name}") if message.name else []
    if message.recipient is not None:
        ids += encode(f" to={message.recipient}")
    if message.channel is not None:
        ids += [special["<|channel|>"], *encode(message.channel)]
    if message.constrained:
        ids += [*encode(" "), special["<|constrain|>"], *encode(message.content_type or "")]
    elif message.content_type is not None:
        ids += encode(f" {message.content_type}")
    ids.append(special["<|message|>"])
    for part in message.content:
        ids += encode(part)
    is_call = message.role == "assistant" and message.recipient is not None
    return [*ids, special["<|call|>" if is_call else "<|end|>"]]
