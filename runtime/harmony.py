"""The harmony chat format, both ways: messages -> prompt ids, and the ids of an answer -> channels.

A message is `<|start|>{role}[ to={recipient}][<|channel|>{channel}][ {content type}]<|message|>`,
its content, and an end token. Special tokens are written by id and all text is encoded segment by
segment, as the model was trained, so no text of a user can become a special token.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import InputError
from .tokenizer import StreamDecoder, Tokenizer

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
REASONING_EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
ROLES = ("system", "developer", "user", "assistant")

# ---- messages -> prompt -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Message:
    role: str
    content: str
    channel: str | None = None


def render_chat(
    messages: Sequence[Mapping[str, object]],
    tokenizer: Tokenizer,
    *,
    reasoning: str = "medium",
    current_date: str | None = None,
    identity: str = IDENTITY,
) -> list[int]:
    """Prompt ids of a conversation, up to and with the `<|start|>assistant` of the answer.

    messages: dicts with "role" (system, developer, user or assistant), "content" (text) and, for
    assistant messages only, optionally "channel" (analysis, commentary or final, the default).

    Harmony's own system message is generated from `identity`, `reasoning` (low, medium or high)
    and `current_date` (e.g. "2025-06-28"; None: no such line). What a user calls a system or a
    developer message gives the developer message's instructions: those at the start of the
    conversation are joined in order, a blank line between them, empty ones left out; one further
    on becomes a developer message of its own at its place.

    Past reasoning is dropped as openai-harmony does: if the last assistant message is final, the
    analysis messages before the first final one are left out.

    Raises InputError for messages or options of another form.
    """
    if reasoning not in REASONING_EFFORTS:
        raise InputError(
            f"reasoning: expected one of {', '.join(REASONING_EFFORTS)}, found {reasoning!r}"
        )
    for name, value in (("current_date", current_date), ("identity", identity)):
        if not isinstance(value, str) and (value is not None or name == "identity"):
            raise InputError(f"{name}: expected text, found {value!r}")
    conversation = _drop_past_analysis(_check_messages(messages))
    num_leading = next(
        (i for i, m in enumerate(conversation) if m.role not in ("system", "developer")),
        len(conversation),
    )
    instructions = "\n\n".join(m.content for m in conversation[:num_leading] if m.content)
    ids = _encode_message(
        tokenizer, _Message("system", _system_text(identity, current_date, reasoning))
    )
    developer = _developer_text(instructions)
    if developer:
        ids += _encode_message(tokenizer, _Message("developer", developer))
    for message in conversation[num_leading:]:
        if message.role in ("system", "developer"):
            message = _Message("developer", _developer_text(message.content))
        ids += _encode_message(tokenizer, message)
    return [*ids, tokenizer.special["<|start|>"], *tokenizer.encode("assistant")]


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: `<|return|>`, `<|call|>` and `<|endoftext|>`.

    `<|end|>` is not among them: after an analysis message the model goes on with another one.
    """
    return frozenset(
        tokenizer.special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>")
    )


def _check_messages(messages: Sequence[Mapping[str, object]]) -> list[_Message]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            "messages: expected a list of dicts such as "
            f'{{"role": "user", "content": "Hello"}}, found {type(messages).__name__}'
        )
    if not messages:
        raise InputError("messages: expected at least one message, found an empty list")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _check_message(where: str, message: Mapping[str, object]) -> _Message:
    if not isinstance(message, Mapping):
        raise InputError(
            f'{where}: expected a dict with "role" and "content", found {type(message).__name__}'
        )
    role, content, channel = message.get("role"), message.get("content"), message.get("channel")
    if role not in ROLES:
        raise InputError(f"{where}: expected a role of {', '.join(ROLES)}, found {role!r}")
    if not isinstance(content, str):
        raise InputError(
            f"{where}: expected text as content, found {type(content).__name__}; "
            "join the parts of a message into one string"
        )
    unknown = [
        str(key)
        for key, value in message.items()
        if key not in ("role", "content", "channel") and value is not None
    ]
    if unknown:  # leaving them out silently would change what the user means
        raise InputError(
            f"{where}: expected the keys role, content and channel only, "
            f"found {', '.join(unknown)}; leave them out"
        )
    if role != "assistant":
        if channel is not None:
            raise InputError(
                f"{where}: expected a channel in assistant messages only, found one "
                f"in a {role} message; leave it out"
            )
        return _Message(str(role), content)
    if channel is None:
        channel = "final"
    if channel not in CHANNELS:
        raise InputError(f"{where}: expected a channel of {', '.join(CHANNELS)}, found {channel!r}")
    return _Message("assistant", content, str(channel))


def _drop_past_analysis(conversation: list[_Message]) -> list[_Message]:
    channels = [m.channel for m in conversation if m.role == "assistant"]
    if not channels or channels[-1] != "final":  # in the middle of an answer
        return conversation
    first_final = next(i for i, m in enumerate(conversation) if m.channel == "final")
    return [m for i, m in enumerate(conversation) if i >= first_final or m.channel != "analysis"]


def _system_text(identity: str, current_date: str | None, reasoning: str) -> str:
    about = [identity, f"Knowledge cutoff: {KNOWLEDGE_CUTOFF}"]
    if current_date is not None:
        about.append(f"Current date: {current_date}")
    sections = [
        "\n".join(about),
        f"Reasoning: {reasoning}",
        f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message.",
    ]
    return "\n\n".join(sections)


def _developer_text(instructions: str) -> str:
    """The developer message, one section per thing that it tells; "" when there is nothing."""
    sections = [f"# Instructions\n\n{instructions}"] if instructions else []
    return "\n\n".join(sections)


def _encode_message(tokenizer: Tokenizer, message: _Message) -> list[int]:
    special = tokenizer.special
    ids = [special["<|start|>"], *tokenizer.encode(message.role)]
    if message.channel is not None:
        ids += [special["<|channel|>"], *tokenizer.encode(message.channel)]
    return [*ids, special["<|message|>"], *tokenizer.encode(message.content), special["<|end|>"]]


# ---- answer -> channels -------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Text that a model said in one message: what became readable now, or all of it.

    channel is analysis (its reasoning), commentary (for tools, or a preamble), final (the answer)
    or what else the model wrote there. recipient names the tool that the message calls, if any.
    """

    channel: str
    text: str
    recipient: str | None = None


class ChannelParser:
    """Reads the ids of an answer as they come; the prompt ended with `<|start|>assistant`.

    `messages` holds the ended messages, each a Piece with its whole text; after finish() the last
    one too, even if it was cut off. Incomplete characters are held back. Whatever the model says
    is read without an error:

    - text without a header, at the start or after a message, is a message on channel final;
    - a message without a channel is on final, or on commentary if it has a recipient;
    - `<|start|>` or `<|channel|>` inside a message ends it and begins the next;
    - other special tokens inside a message are left out;
    - a header that ends before its `<|message|>` says nothing and is left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.messages: list[Piece] = []
        self._channel: str | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._special_names = {id: name for name, id in tokenizer.special.items()}
        self._begin_header(explicit=False)

    @property
    def final_text(self) -> str:
        """The answer: the text of the ended messages on channel final."""
        return "".join(m.text for m in self.messages if m.channel == "final")

    def push(self, token_id: int) -> list[Piece]:
        """The text that this id completes: mostly one Piece or none."""
        name = self._special_names.get(token_id)
        if name is None:
            return self._take_text(self._decoder.push(token_id))
        pieces = self._take_text(self._decoder.flush())
        if name in ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"):
            pieces += self._end_message()
            self._begin_header(explicit=False)
        elif name == "<|start|>":
            pieces += self._end_message()
            self._begin_header(explicit=True)
        elif name == "<|channel|>":
            if not self._in_header:
                pieces += self._end_message()
                self._begin_header(explicit=False)
            self._channel = ""
        elif name == "<|message|>" and self._in_header:
            self._begin_content()
        elif name == "<|constrain|>" and self._in_header:
            pieces += self._take_text(" ")  # the content type that follows is a word of its own
        return pieces

    def finish(self) -> list[Piece]:
        """Call once after the last id: what was held back. Ends the message that was cut off."""
        pieces = self._take_text(self._decoder.flush()) + self._end_message()
        self._begin_header(explicit=False)
        return pieces

    def _begin_header(self, explicit: bool) -> None:
        """explicit: after `<|start|>`; else the role assistant is understood."""
        self._in_header = True
        self._explicit = explicit
        self._role = ""  # the text before <|channel|>: role and recipient
        self._channel = None  # the text after it: channel, recipient, content type

    def _begin_content(self) -> None:
        in_channel = self._channel or ""
        found = re.search(r"(?:^|\s)to=(\S+)", f"{self._role} {in_channel}")
        recipient = found.group(1) if found else None
        words = [word for word in in_channel.split() if not word.startswith("to=")]
        channel = words[0] if words else ("commentary" if recipient else "final")
        self._in_header = False
        self._message = Piece(channel, "", recipient)
        self._texts: list[str] = []

    def _begin_unheaded(self) -> list[Piece]:
        """What was read as a header is the beginning of a text on channel final."""
        text = self._role.removeprefix("assistant") if self._explicit else self._role
        self._role = ""
        self._begin_content()
        return self._take_text(text)

    def _take_text(self, text: str) -> list[Piece]:
        if not text:
            return []
        if not self._in_header:
            self._texts.append(text)
            return [replace(self._message, text=text)]
        if self._channel is not None:
            self._channel += text
            return []
        self._role += text
        return [] if _may_be_header(self._role, self._explicit) else self._begin_unheaded()

    def _end_message(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._in_header:
            said = self._role.strip()
            is_header = said in ("", "assistant") or "to=" in said
            if self._explicit or self._channel is not None or is_header:
                return []
            pieces = self._begin_unheaded()  # so short that it could have become a header
        self.messages.append(replace(self._message, text="".join(self._texts)))
        return pieces


def parse_answer(token_ids: Iterable[int], tokenizer: Tokenizer) -> list[Piece]:
    """The messages of a whole answer, each with its whole text (see ChannelParser)."""
    parser = ChannelParser(tokenizer)
    for token_id in token_ids:
        parser.push(token_id)
    parser.finish()
    return parser.messages


def _may_be_header(text: str, explicit: bool) -> bool:
    """Whether `text` can be what stands before <|channel|>, or its beginning: role, recipient."""
    role, space, recipient = text.partition(" ")
    if explicit:
        is_role = re.fullmatch(r"[\w.:-]*", role) is not None
    else:
        is_role = role in ("", "assistant") or (not space and "assistant".startswith(role))
    is_recipient = recipient.startswith("to=") or "to=".startswith(recipient)
    return not text.strip() or (is_role and is_recipient)
