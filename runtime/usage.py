"""What an answer took."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens. cached_tokens: those of the prompt that were not computed, because the KV
    cache had them. reasoning_tokens: those of the completion that told reasoning, headers included;
    known in a chat only."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
