"""Models that would rather say something else than they may, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from osscompile.runtime import Finish, GeneratedToken, Model, Piece, as_messages
from osscompile.runtime.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "How old is Ann, 33, and is she happy?"}]
ANN: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "happy": {"type": "boolean"}},
    "required": ["age", "happy"],
    "additionalProperties": False,
}
LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
DIGITS = {"type": "grammar", "syntax": "regex", "definition": "[0-9]{1,3}"}

Ask = Callable[..., tuple[dict[str, str], Finish]]


def asker(model: Model, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks a model that wishes for a text, and then for `last`: what it says by channel, and how it
    ends."""
    assert model.tokenizer is not None
    special = model.tokenizer.special

    def ask(text: str, last: str = "<|return|>", **options: Any) -> tuple[dict[str, str], Finish]:
        wish = Wish(model, text, last, monkeypatch)
        pieces = list(model.chat(QUESTION, **options))
        assert isinstance(pieces[-1], Finish)
        if pieces[-1].reason == "tool_calls":  # only `<|call|>` ends one, and then nothing follows
            arguments = wish.said[::-1][: wish.said[::-1].index(special["<|message|>"])]
            assert not {*arguments} & {*special.values()}
        return texts(pieces), pieces[-1]

    return ask


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text, in which names of special tokens stand for them."""
    ids: list[int] = []
    while text:
        found = {text.find(name): name for name in tokenizer.special if name in text}
        at = min(found, default=len(text))
        name = found.get(at, "")
        ids += [*tokenizer.encode(text[:at]), *([tokenizer.special[name]] if name else [])]
        text = text[at + len(name) :]
    return ids


OTHERS = ("<|end|>", "}", "0", '"')


class Wish:
    """A network that wants to say `text`, whatever came before, and then `last` for ever. Where it
    must not say what it wants, it says the first of OTHERS that it may, and wishes on."""

    def __init__(self, model: Model, text: str, last: str, patch: pytest.MonkeyPatch) -> None:
        assert model.tokenizer is not None
        self._vocab_size = model.vocab_size
        self._wanted = spelled(model.tokenizer, text)
        (self._last,) = spelled(model.tokenizer, last)
        self._others = [id for text in OTHERS for id in spelled(model.tokenizer, text)]
        self.prompts: list[list[int]] = []
        self.said: list[int] = []  # but the last, which nothing follows
        patch.setattr(model, "_prefill", self._start)
        patch.setattr(model, "_decode", self._next)

    def _start(self, prompt: list[int]) -> NDArray[np.float32]:
        self.prompts.append(prompt)
        return self._logits()

    def _next(self, token_id: int) -> NDArray[np.float32]:
        self.said.append(token_id)
        return self._logits()

    def _logits(self) -> NDArray[np.float32]:
        logits = np.zeros((1, self._vocab_size), np.float32)
        wanted = self._wanted[len(self.said) :]
        logits[0, self._others] = np.linspace(2, 1, len(self._others))
        logits[0, wanted[0] if wanted else self._last] = 3
        return logits


def texts(pieces: Sequence[Piece]) -> dict[str, str]:
    """By channel; of a call its arguments by its name."""
    said: dict[str, str] = {}
    for message in as_messages(pieces):
        channel, content = str(message["channel"]), str(message["content"])
        for call in message.get("tool_calls", ()):  # type: ignore[attr-defined]
            channel, content = call["function"]["name"], call["function"]["arguments"]
        assert channel not in said  # nothing is said twice
        said[channel] = content
    return said


def text_of(tokens: Iterable[GeneratedToken]) -> str:
    """Without the token that ends it."""
    *said, last = tokens
    assert last.finish_reason == "stop"
    return "".join(token.text for token in said)


def analysis(text: str) -> str:
    return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"


ANSWER = '{"age": 33, "happy": true}'
FINAL = "<|channel|>final<|message|>"
