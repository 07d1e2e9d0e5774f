"""What a generation gives: tokens, and in a chat the pieces that they tell."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace

from .harmony import Finish, Piece, stream_answer
from .sampler import Sample
from .sampling_options import SamplingOptions
from .stop_strings import TextStream
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


class TokenStream:
    """Makes the tokens of an answer of what was sampled, and says when it ends: with an id of
    `stops`, a stop string, or `limit` tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...],
        stops: Set[int],
        prompt_tokens: int,
        limit: int,
    ) -> None:
        self._texts, self._stops, self._limit = TextStream(tokenizer, stop), stops, limit
        self._usage = Usage(prompt_tokens)
        self.count = 0  # of tokens so far

    def begin(self, cached_tokens: int) -> None:
        """So many of the prompt's tokens were not computed; what is told later does not count."""
        if self.count == 0:
            self._usage = replace(self._usage, cached_tokens=cached_tokens)

    def push(self, sample: Sample) -> GeneratedToken:
        self.count += 1
        ends, full = sample.token_id in self._stops, self.count == self._limit
        text = self._texts.push(sample.token_id, is_last=ends or full)
        reason = "stop" if ends or self._texts.stopped else "length" if full else None
        usage = replace(self._usage, completion_tokens=self.count)
        return GeneratedToken(
            sample.token_id, sample.logprob, sample.top_logprobs, text, reason, usage
        )


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
        yield with_usage(piece, usage)


def with_usage(piece: Piece, usage: Usage) -> Piece:
    """The last piece says what the answer took; which tokens told reasoning it knows itself."""
    if not isinstance(piece, Finish):
        return piece
    reasoning = piece.usage.reasoning_tokens
    return replace(piece, usage=replace(usage, reasoning_tokens=reasoning))
