"""What a generation gives: tokens, and in a chat the pieces that they tell."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

from .harmony import Finish, Piece, PieceStream
from .sampler import Sample
from .sampling_options import SamplingOptions
from .stop_strings import TextStream
from .tokenizer import Tokenizer
from .usage import Usage


@dataclass(frozen=True)
class GeneratedToken(Sample):
    """A token and the text that became complete with it: "" within a character of several bytes,
    or while it may be the beginning of a stop string, for an id that ends the answer, and for
    artifacts without a tokenizer.

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
        # an id that ends the answer is none of its text
        text = self._texts.finish() if ends else self._texts.push(sample.token_id, is_last=full)
        reason = "stop" if ends or self._texts.stopped else "length" if full else None
        usage = replace(self._usage, completion_tokens=self.count)
        return GeneratedToken(
            sample.token_id, sample.logprob, sample.top_logprobs, text, reason, usage
        )


class PieceMaker:
    """Makes the pieces of an answer in a chat; the last says what all of it took. `begun`: ids of
    the answer that the prompt had. `one_call`: it ends with its first call."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: SamplingOptions,
        begun: Sequence[int],
        one_call: bool = False,
    ) -> None:
        self._stream = PieceStream(tokenizer, options.stop, begun, one_call)
        self._stops = options.stop_ids
        self._tells_logprobs = options.logprobs is not None
        self._untold: list[Sample] = []  # tokens since the last piece
        self.ended = False

    def push(self, token: GeneratedToken) -> list[Piece]:
        """What is told with this token, and the end if it is the last or comes to a stop string."""
        pieces = self._stream.push(token.token_id)
        if token.finish_reason is not None:
            reason = "stop" if token.token_id in self._stops else "length"
            pieces = pieces + self._stream.finish(reason)
        self.ended = self._stream.ended
        if self._tells_logprobs:
            self._untold.append(Sample(token.token_id, token.logprob, token.top_logprobs))
        if pieces:
            pieces = [replace(pieces[0], logprobs=tuple(self._untold)), *pieces[1:]]
            self._untold = []
        return [self._with_usage(piece, token.usage) for piece in pieces]

    def _with_usage(self, piece: Piece, usage: Usage) -> Piece:
        """Which tokens told reasoning, the last piece knows itself."""
        if not isinstance(piece, Finish):
            return piece
        reasoning = piece.usage.reasoning_tokens
        return replace(piece, usage=replace(usage, reasoning_tokens=reasoning))
