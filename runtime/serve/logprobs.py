"""Log-probabilities of tokens, as OpenAI's API tells them."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..sampler import Sample
from ..tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity


class Logprobs:
    """Tells those of a vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._message = tokenizer.special["<|message|>"]

    def of_content(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Tokens of a piece of text, without those of the header before it."""
        ids = [sample.token_id for sample in samples]
        header = len(ids) - ids[::-1].index(self._message) if self._message in ids else 0
        return [*map(self._token, samples[header:])]

    def text_of(self, id: int) -> str:
        return self._tokenizer.decode([id])

    def _token(self, sample: Sample) -> dict[str, Any]:
        assert sample.logprob is not None
        top = [self._entry(*alternative) for alternative in sample.top_logprobs]
        return {**self._entry(sample.token_id, sample.logprob), "top_logprobs": top}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_bytes(id)
        token = text.decode(errors="replace")
        return {"token": token, "logprob": max(logprob, LEAST), "bytes": list(text)}


class CompletionLogprobs:
    """Those of a completion, in the older form: lists that grow with each token."""

    def __init__(self, logprobs: Logprobs, offset: int) -> None:
        """`offset`: of the first token's text in that of the choice."""
        self._logprobs, self._offset = logprobs, offset

    def of_tokens(self, samples: Sequence[Sample]) -> dict[str, Any]:
        texts = [self._logprobs.text_of(sample.token_id) for sample in samples]
        return {
            "tokens": texts,
            "token_logprobs": [max(s.logprob or 0.0, LEAST) for s in samples],
            "top_logprobs": [dict(self._top(sample)) for sample in samples],
            "text_offset": [self._advance(text) for text in texts],
        }

    def _top(self, sample: Sample) -> Iterator[tuple[str, float]]:
        for id, logprob in sample.top_logprobs:
            yield self._logprobs.text_of(id), max(logprob, LEAST)

    def _advance(self, text: str) -> int:
        self._offset += len(text)
        return self._offset - len(text)
