"""Answers under a constraint, as a model without a mind would give them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from osscompile.runtime.constraint import Constraint, is_allowed
from osscompile.runtime.grammar import Grammars, grammar_of
from osscompile.runtime.harmony.structured import read_response_format
from osscompile.runtime.tokenizer import Tokenizer

CLOSING = frozenset(b'"}]0,: ')


class Walks:
    """Random answers for one tokenizer, whose ids beyond the table are no tokens."""

    def __init__(self, tokenizer_json: Path, vocab_size: int | None = None) -> None:
        self.tokenizer = Tokenizer(tokenizer_json)
        self.vocab_size = vocab_size or self.tokenizer.vocab_size
        self.end = self.tokenizer.special["<|return|>"]
        self.grammars = Grammars(self.tokenizer, self.vocab_size, {self.end})
        texts = map(self.tokenizer.token_bytes, range(self.vocab_size))
        self._closing = np.array([CLOSING.issuperset(text) and text != b"" for text in texts])

    def constraint(self, response_format: dict[str, Any]) -> Constraint:
        """Raises InputError where the format is not supported."""
        asked = read_response_format(response_format)
        assert asked is not None
        return self.grammars.constraint("it", [grammar_of("it", asked)])

    def walk(self, constraint: Constraint, random: Random, most: int) -> str | None:
        """A text of random tokens, each of which was allowed, with a bias to those that close
        something and to the end; None where `most` tokens have not come to it."""
        said: list[int] = []
        while len(said) < most:
            allowed = self.allowed(constraint)
            if allowed[self.end] and (random.random() < 0.5 or allowed.sum() == 1):
                return b"".join(map(self.tokenizer.token_bytes, said)).decode()
            allowed[self.end] = False
            closing = allowed & self._closing
            if closing.any() and random.random() < 0.7:
                allowed = closing
            said.append(int(random.choice(np.flatnonzero(allowed))))
            constraint.push(said[-1])
        return None

    def accepts(self, constraint: Constraint, text: str) -> bool:
        """Whether each token of it is allowed, and then the end."""
        for token_id in self.tokenizer.encode(text):
            if not self.allowed(constraint)[token_id]:
                return False
            constraint.push(token_id)
        return bool(self.allowed(constraint)[self.end])

    def allowed(self, constraint: Constraint) -> np.ndarray:
        mask = constraint.mask()
        assert mask is not None and constraint.error is None, constraint.error
        return is_allowed(mask, self.vocab_size).copy()


def of_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def in_order(value: Any, names: Sequence[str]) -> Any:
    """The same with its properties in this order, in which a grammar wants them."""
    if isinstance(value, dict):
        order = [*(name for name in names if name in value), *value]
        return {name: in_order(value[name], names) for name in order}
    return [in_order(item, names) for item in value] if isinstance(value, list) else value


def property_names(schema: Any) -> Iterable[str]:
    """As they come in a schema."""
    if isinstance(schema, dict):
        for key, below in schema.items():
            if key == "properties":
                yield from below
            if key == "required" and isinstance(below, list):
                yield from (name for name in below if isinstance(name, str))
            yield from property_names(below)
    elif isinstance(schema, list):
        for below in schema:
            yield from property_names(below)


def load_data(name: str) -> Any:
    return json.loads((Path(__file__).with_name("data") / name).read_text("utf-8"))
