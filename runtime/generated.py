"""What a generation gives: tokens, and in a chat the pieces that they tell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from .harmony import Finish, Piece, stream_answer
from .sampler import Sample
from .sampling_options import SamplingOptions
from .tokenizer import Tokenizer
from .usage import Usage


@dataclass(frozen=True)
class GeneratedToken(Sample):
    """A token and the text that became complete with it: "" within a character of several bytes,
    or while it may be the beginning of a stop string, and for artifacts without a tokenizer.

    finish_reason: None but for the last one, which a stop id or string ended ("stop"), or
    max_tokens or the context's end ("length"). usage: what the answer took up to this token; it is
    not compared.
    """

    text: str = ""
    finish_reason: str | None = None
    usage: Usage = field(default=Usage(), compare=False)


def generated_pieces(
    tokens: Iterator[GeneratedToken],
    tokenizer: Tokenizer,
    options: SamplingOptions,
    begun: Sequence[int],
) -> Iterator[Piece]:
    """The pieces of an answer in a chat; the last says what all of it took. begun: ids of it that
    the prompt had."""
    usage = Usage()

    def ids() -> Iterator[int]:
        nonlocal usage
        for token in tokens:
            usage = token.usage
            yield token.token_id

    for piece in stream_answer(ids(), tokenizer, options.stop_ids, options.stop, begun):
        if isinstance(piece, Finish):
            reasoning = piece.usage.reasoning_tokens
            piece = replace(piece, usage=replace(usage, reasoning_tokens=reasoning))
        yield piece
