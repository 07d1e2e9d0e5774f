"""The ids of an answer -> what the model says: pieces of text, calls of tools, and the end."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..stop_strings import StopSearch
from ..tokenizer import StreamDecoder, Tokenizer
from ..usage import Usage
from .events import Arguments, Finish, Piece, Reasoning, Text, ToolCall
from .header import (
    FUNCTIONS,
    Header,
    Segment,
    num_bytes_of_names,
    plain_text,
    read_header,
    without_cut_word,
)

# So many tokens are held back at most until they turn out to be a header, or not; and more for the
# name of a function, which may take as many as it has bytes.
MOST_HELD = 32
ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: `<|return|>`, `<|call|>` and `<|endoftext|>`.

    `<|end|>` is not among them: after an analysis message the model goes on with another one.
    """
    return frozenset(tokenizer.special[name] for name in ENDS)


class AnswerParser:
    """Reads the ids of an answer as they come; the prompt ended with `<|start|>assistant`, and
    perhaps had the beginning of the answer after it: `begun`, of which nothing is told.

    Whatever the model says is read without an error, and none of its text is left out. What is a
    header, and what is text, may be uncertain: such tokens are held back until `<|message|>`, the
    end of the message or MOST_HELD tokens beside a recipient's tell. Incomplete characters are held
    back as well.

    - Header: see `read_header`. Without a channel, a call is on commentary, other text on final.
      Text in a header is content, where there is no place for it in a header.
    - Text without a header is the answer, or if a message with a header follows, reasoning.
    - `<|start|>` or `<|channel|>` inside a message ends it and begins the next; other special
      tokens inside a message are left out.
    - Once another role begins to speak, the answer has ended.

    `usage` counts the ids so far, and those of reasoning: an id belongs to what is told with it, or
    next.
    """

    def __init__(self, tokenizer: Tokenizer, begun: Iterable[int] = ()) -> None:
        self.ended = False
        self._decoder = StreamDecoder(tokenizer)
        self._special_names = {id: name for name, id in tokenizer.special.items()}
        self._num_calls = 0
        self._unheaded = ""  # ended messages without a header: what follows tells what they are
        self._num_held = 0
        self._num_tokens = self._num_reasoning = self._num_untold = 0
        self._begin_header("assistant")
        for token_id in begun:
            self._read(token_id)

    @property
    def usage(self) -> Usage:
        return Usage(completion_tokens=self._num_tokens, reasoning_tokens=self._num_reasoning)

    def push(self, token_id: int) -> list[Piece]:
        """What this id tells: mostly one piece or none; none once the answer has ended."""
        if self.ended:
            return []
        self._num_tokens += 1
        self._num_untold += 1
        pieces = self._read(token_id)
        if pieces:
            if all(isinstance(piece, Reasoning) for piece in pieces):
                self._num_reasoning += self._num_untold
            self._num_untold = 0
        return pieces

    def _read(self, token_id: int) -> list[Piece]:
        name = self._special_names.get(token_id)
        if name is None:
            self._num_held += 1
            return self._take_text(self._decoder.push(token_id))
        pieces = self._take_text(self._decoder.flush())
        return pieces if self.ended else pieces + self._take_special(name)

    def finish(self, reason: str = "length") -> list[Piece]:
        """Call once after the last id: what was held back, and the end if no id told it. reason:
        length where the model would have gone on, else stop."""
        if self.ended:
            return []
        pieces = self._take_text(self._decoder.flush())
        return pieces if self.ended else pieces + self._end(reason)

    def stop(self) -> Finish:
        """End the answer here: what would be told next is not."""
        self.ended = True
        return Finish("tool_calls" if self._num_calls else "stop", self.usage)

    def _take_text(self, text: str) -> list[Piece]:
        if self._segments is None:
            return self._say(text)
        self._segments[-1].text += text
        if self._num_held < MOST_HELD + num_bytes_of_names(self._segments):
            return []
        if self._unheaded:  # what came after it may yet become a header
            text, self._unheaded, self._num_held = self._unheaded, "", 0
            return [Text("final", text, begins=True)]
        header = read_header(self._segments, is_whole=False)
        if header.is_header:
            return self._begin_message(header)
        return self._say_unheaded(plain_text(self._segments))

    def _take_special(self, name: str) -> list[Piece]:
        if name in ENDS:
            return self._end("stop")
        if name in ("<|end|>", "<|start|>"):
            return self._end_message() + self._begin_header("" if name == "<|end|>" else name)
        if name == "<|channel|>" and self._has_content():
            pieces = self._end_message() + self._begin_header("")
            self._add_segment(name)
            return pieces
        if self._segments is None:
            return []
        if name == "<|message|>":
            return self._begin_message(read_header(self._segments, is_whole=True), is_whole=True)
        if name in ("<|channel|>", "<|constrain|>"):
            self._add_segment(name)
        return []

    def _begin_header(self, opener: str) -> list[Piece]:
        self._segments: list[Segment] | None = [Segment(opener)]  # None: within a message
        if not self._unheaded:
            self._num_held = 0
        return []

    def _add_segment(self, opener: str) -> None:
        assert self._segments is not None
        if len(self._segments) > 1 and not self._segments[-1].text:  # else they could be endless
            self._segments.pop()
        self._segments.append(Segment(opener))

    def _has_content(self) -> bool:
        """Whether a message has begun, perhaps without its `<|message|>`, which another
        `<|channel|>` ends; within a header it repeats the channel."""
        if self._segments is None:
            return True
        return bool(read_header(self._segments, is_whole=False).rest)

    def _begin_message(self, header: Header, is_whole: bool = False) -> list[Piece]:
        if header.other_role:
            self._segments = None
            return self._end("stop")
        lead, self._unheaded = self._unheaded + header.lead, ""
        pieces: list[Piece] = [_text("analysis", lead, True)] if lead.strip() else []
        rest = header.rest if header.rest.strip() else ""
        channel = header.channel or ("commentary" if header.recipient else "final")
        if is_whole and header.recipient and rest:  # it is not among the arguments
            pieces.append(_text(channel, rest, True))
            rest = ""
        pieces += self._begin_content(channel, header.recipient)
        return pieces + self._say(rest)

    def _begin_content(self, channel: str, recipient: str | None = None) -> list[Piece]:
        self._segments = None
        self._channel, self._begins = channel, recipient is None
        self._call_id: str | None = None
        if recipient is None:
            return []
        self._call_id = f"call_{self._num_calls}"
        self._num_calls += 1
        name = recipient.removeprefix(FUNCTIONS)
        return [ToolCall(channel, self._call_id, name, begins=True)]

    def _say(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._call_id is not None:
            return [Arguments(self._channel, self._call_id, text)]
        begins, self._begins = self._begins, False
        return [_text(self._channel, text, begins)]

    def _say_unheaded(self, text: str) -> list[Piece]:
        """Text without a header that no header follows."""
        text, self._unheaded = self._unheaded + text, ""
        self._begin_content("final")
        return self._say(text if text.strip() else "")

    def _end_message(self) -> list[Piece]:
        """A message ends, perhaps before its `<|message|>`, and something follows."""
        if self._segments is None:
            return []
        header = read_header(self._segments, is_whole=False)
        if header.is_header:
            return self._begin_message(header)
        text = self._unheaded + plain_text(self._segments)
        self._unheaded = text if text.strip() else ""
        return []

    def _end(self, reason: str) -> list[Piece]:
        """The answer ends, perhaps within a header."""
        pieces: list[Piece] = []
        if self._segments is not None:
            segments = self._segments if reason == "stop" else without_cut_word(self._segments)
            header = read_header(segments, is_whole=False)
            if not header.is_header:
                pieces = self._say_unheaded(plain_text(segments))
            elif reason == "stop" or header.rest:
                pieces = self._begin_message(header)
            elif header.lead:
                pieces = self._begin_message(replace(header, recipient=None))
        pieces += self._say_unheaded("") if self._unheaded else []
        if self.ended:
            return pieces
        end = self.stop()
        return [*pieces, end if reason == "stop" else replace(end, reason=reason)]


class PieceStream:
    """What the ids of an answer tell, up to one of the strings `stop` on channel final, or with
    `one_call` to the end of a call."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        begun: Sequence[int] = (),
        one_call: bool = False,
    ) -> None:
        self._parser, self._search = AnswerParser(tokenizer, begun), StopSearch(stop)
        self._one_call, self._has_called = one_call, False
        self._begins = False  # with the final text that is shown next

    @property
    def ended(self) -> bool:
        return self._parser.ended

    def push(self, id: int) -> list[Piece]:
        return self._shown(self._parser.push(id))

    def finish(self, reason: str) -> list[Piece]:
        """What is left when no id follows, and the end; `reason` unless the answer is whole."""
        return self._shown(self._parser.finish(reason))

    def _shown(self, pieces: list[Piece]) -> list[Piece]:
        shown: list[Piece] = []
        for piece in pieces:
            if self._has_called and not isinstance(piece, Arguments | Finish):
                return [*shown, self._parser.stop()]
            self._has_called = self._one_call and isinstance(piece, ToolCall | Arguments)
            is_searched = isinstance(piece, Text) and piece.channel == "final"
            if not is_searched or piece.begins:  # another message: what was held back is none
                shown += self._final(self._search.flush())
            if not is_searched:
                shown.append(piece)
                continue
            self._begins = self._begins or piece.begins
            shown += self._final(self._search.push(piece.text))
            if self._search.found:
                return [*shown, self._parser.stop()]
        return shown

    def _final(self, text: str) -> list[Piece]:
        if not text:
            return []
        begins, self._begins = self._begins, False
        return [Text("final", text, begins=begins)]


def _text(channel: str, text: str, begins: bool) -> Piece:
    kind = Reasoning if channel == "analysis" else Text
    return kind(channel, text, begins=begins)
