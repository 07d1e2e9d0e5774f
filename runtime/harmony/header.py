"""The header of a message, as models write it: with parts that are missing, doubled or astray."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

CHANNELS = ("analysis", "commentary", "final")
# A content type without its <|constrain|>; of any other word nobody could tell.
CONTENT_TYPES = ("json", "code", "text")
# Recipients that are no tools: what is sent to them is text.
FUNCTIONS = "functions."  # begins the recipients of calls of functions
LONGEST_NAME = 256  # bytes, of a function
PEOPLE = ("", "all", "assistant", "user", "functions", FUNCTIONS)
OTHER_ROLES = ("user", "system", "developer", "tool", "python", "browser", "functions")

_WORD = re.compile(r"\s*(\S+)")
# A name ends where arguments begin, also without a blank between.
_NAME = r"[^\s{}()\[\]\"]"
_RECIPIENT = re.compile(rf"\s*to=({_NAME}*)")
_BEGUN_NAME = re.compile(rf"(?:to=|functions\.)({_NAME}*)")
# A type is the last word but for a recipient, or has arguments after it: else it is a word of text.
_BEFORE_END = r"(?=\s*(?:$|to=|[{\[]))"
_TYPE = re.compile(rf"\s*({'|'.join(CONTENT_TYPES)}){_BEFORE_END}")
# Before code without a header's end; a name that an operator follows is part of the code.
_TYPE_OF_ARGUMENTS = re.compile(
    rf"\s*({'|'.join(CONTENT_TYPES)})(?=[{{\[]|\s*$|\s+[^\s=+*/<>!.,-])"
)
_CONSTRAINED_TYPE = re.compile(rf"\s*([A-Za-z][\w.+/-]*){_BEFORE_END}")
_CONSTRAINED_RECIPIENT = re.compile(
    rf"\s*(functions\.{_NAME}+)(?=(?:\s*(?:{'|'.join(CONTENT_TYPES)}))?\s*(?:$|[{{\[]))"
)
# A role is followed by the header's end or next sign: else it is a word of text.
_BEFORE_SIGN = rf"(?=\s*(?:$|to=|(?:{'|'.join(CHANNELS)})\b))"
_ASSISTANT = re.compile(rf"\s*assistant(?::\S+)?{_BEFORE_SIGN}")
_STARTED_ASSISTANT = re.compile(rf"\s*assistant(?::\S+|(?=\s|$|(?:{'|'.join(CHANNELS)})\b))")
_STARTED_TEXT = re.compile(rf"assistant(?=[\s:]|$|(?:{'|'.join(CHANNELS)})\b)")
_ODD_CHANNEL = re.compile(r"\s*([A-Za-z][\w-]*[?!.,:;]*)(?:\s+to=\S*)?\s*")
_ONLY_RECIPIENT = re.compile(r"(?:\s*to=\S*)?\s*")
_OTHER_ROLE = re.compile(rf"\s*(?:{'|'.join(OTHER_ROLES)})(?:[.:]\S*)?{_BEFORE_SIGN}")
_TOOLS_RESULT = re.compile(
    rf"\s*(?!(?:assistant|{'|'.join(CHANNELS)})\b)[\w.:-]+\s+to=assistant(?=\s|$)"
)


@dataclass
class Segment:
    """The text after one special token. opener: its name; "" where a header began without one, and
    "assistant" for the first, which the prompt began."""

    opener: str
    text: str = ""


@dataclass(frozen=True)
class Header:
    """lead: text before the header proper; rest: text that is no part of a header, after it.

    channel and recipient are None where the header names none; a recipient is always a tool's name.
    other_role: another than the assistant speaks. is_header: without it, all is text.
    """

    channel: str | None
    recipient: str | None
    lead: str
    rest: str
    other_role: bool
    is_header: bool


def read_header(segments: Sequence[Segment], is_whole: bool) -> Header:
    """is_whole: `<|message|>` ended it; else its text may already be the content.

    The first channel and recipient stand. The first known channel is the channel, wherever it is,
    and only where there is none, a single unknown word. A channel's name that begins a text before
    any `<|channel|>` is a word of that text, unless `<|message|>` follows and nothing else names a
    channel.
    """
    reader = _Reader(is_whole)
    for segment in segments:
        reader.read(segment)
    channel, lead = reader.channel, reader.lead
    if channel is None:
        found = re.search(rf"\b({'|'.join(CHANNELS)})\b", reader.rest)
        channel = found.group() if found else reader.odd_channel
    if channel is None and is_whole:
        channel = reader.doubtful_channel
    elif reader.doubtful_channel is not None:
        lead = plain_text(segments[:1]).lstrip()
    if reader.odd_channel not in (None, channel):
        lead = f"{lead}{reader.odd_channel}"
    recipient = None if reader.recipient in PEOPLE else reader.recipient
    has_channel = any(s.opener == "<|channel|>" for s in segments)
    other_role = _is_other_role(segments[0], is_whole or has_channel)
    names_channel = channel is not None and len(segments) > 1
    is_header = is_whole or other_role or names_channel or recipient is not None
    return Header(channel, recipient, lead, reader.rest, other_role, is_header)


def is_name(name: str) -> bool:
    """Whether a header tells it whole."""
    fits = len(name.encode()) <= LONGEST_NAME
    return fits and re.fullmatch(rf"{_NAME}+", name) is not None


def num_bytes_of_names(segments: Sequence[Segment]) -> int:
    """How many the recipients take so far, of each as many as the longest name has."""
    most = LONGEST_NAME + len(FUNCTIONS)
    names = (found for s in segments for found in _BEGUN_NAME.findall(s.text))
    return max((min(len(name.encode()), most) for name in names), default=0)


def plain_text(segments: Sequence[Segment]) -> str:
    """What was taken for a header, as the text that it is."""
    text = "".join(segment.text for segment in segments)
    is_started = segments[0].opener == "<|start|>"
    return _STARTED_TEXT.sub("", text, 1) if is_started and _STARTED_TEXT.match(text) else text


def without_cut_word(segments: Sequence[Segment]) -> Sequence[Segment]:
    """A header that was cut off, without the beginning of what was to become one of its words."""
    last = segments[-1]
    *before, word = re.split(r"(?<=\s)", last.text)
    words = (*CHANNELS, *CONTENT_TYPES, "to=", "assistant", *OTHER_ROLES)
    shorter = [*segments[:-1], Segment(last.opener, "".join(before))]
    header = read_header(shorter, is_whole=False)
    begins_text = header.lead and len(segments) == 1
    is_text = header.rest or begins_text or not last.opener.startswith("<|")
    return segments if is_text or not any(w.startswith(word) for w in words) else shorter


class _Reader:
    def __init__(self, is_whole: bool) -> None:
        self._is_whole = is_whole
        self.channel: str | None = None
        self.doubtful_channel: str | None = None  # begins a text before any `<|channel|>`
        self.odd_channel: str | None = None
        self.recipient: str | None = None
        self.lead = ""
        self.rest = ""

    def read(self, segment: Segment) -> None:
        if self.rest:
            self.rest += segment.text
            return
        left = self._read_words(segment)
        is_arguments = self.recipient is not None and not self._is_whole
        if segment.opener in ("<|channel|>", "<|constrain|>") or is_arguments:
            self.rest = left
        else:
            self.lead = left
            if left and self.recipient is None:
                self.channel, self.doubtful_channel = None, self.channel

    def _read_words(self, segment: Segment) -> str:
        """Take the words of a header from the beginning of a segment; the text after them."""
        text, opener = segment.text, segment.opener
        role = _STARTED_ASSISTANT if opener == "<|start|>" else _ASSISTANT
        if opener not in ("<|channel|>", "<|constrain|>") and (found := role.match(text)):
            text = text[found.end() :]
        has_channel = has_type = False
        while found := _WORD.match(text):
            channel = None if has_channel else _known_channel(found.group(1))
            if recipient := _RECIPIENT.match(text) or self._match_bare_recipient(text, opener):
                found = recipient
                self.recipient = self.recipient or found.group(1)
            elif channel is not None:
                has_channel = True
                self.channel = self.channel or channel
            elif not has_type and (type := self._match_type(text, opener)):
                found, has_type = type, True
            elif not has_channel and (odd := self._match_odd_channel(text, opener)):
                has_channel = True
                self.odd_channel = odd.group(1)
            else:
                break
            text = text[found.end() :]
        return text.lstrip()

    def _match_bare_recipient(self, text: str, opener: str) -> re.Match[str] | None:
        """A function's name where a content type should be, in a header that has no recipient."""
        is_expected = opener == "<|constrain|>" and self.recipient is None
        return _CONSTRAINED_RECIPIENT.match(text) if is_expected else None

    def _match_type(self, text: str, opener: str) -> re.Match[str] | None:
        if self._is_whole:
            return (_CONSTRAINED_TYPE if opener == "<|constrain|>" else _TYPE).match(text)
        if self.recipient is not None:
            return _TYPE_OF_ARGUMENTS.match(text)
        return _TYPE.match(text) if opener == "<|constrain|>" else None

    def _match_odd_channel(self, text: str, opener: str) -> re.Match[str] | None:
        """A word that stands alone where a channel should be."""
        is_expected = self._is_whole and opener == "<|channel|>" and self.odd_channel is None
        return _ODD_CHANNEL.fullmatch(text) if is_expected else None


def _known_channel(word: str) -> str | None:
    """The channel that is meant by e.g. `Final` or `commentary?`."""
    plain = word.rstrip("?!.,:;").lower()
    return plain if plain in CHANNELS else None


def _is_other_role(first: Segment, is_header: bool) -> bool:
    """Whether another than the assistant begins to speak; the first header is the assistant's."""
    if first.opener == "<|start|>":
        return bool(_OTHER_ROLE.match(first.text) or _TOOLS_RESULT.match(first.text))
    if first.opener or not is_header:
        return False
    found = _OTHER_ROLE.match(first.text)
    return found is not None and _ONLY_RECIPIENT.fullmatch(first.text, found.end()) is not None
