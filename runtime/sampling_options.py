"""How tokens are chosen and where an answer ends, as callers say it: each option checked."""

import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import InputError

MAX_BIAS = 100
MAX_PENALTY = 2
_DIGITS = re.compile("[0-9]{1,18}")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. In this order, each step on what the one before kept, renormalised:
    temperature (0: greedy, the rest is not used) divides the logits; top_k keeps the k most
    probable tokens (0: all); top_p keeps the fewest most probable tokens whose sum reaches it
    (1: all); min_p keeps tokens with at least min_p times the probability of the best (0: all).
    Between equal logits the lowest id comes first.

    The defaults are those that OpenAI recommends for gpt-oss. Numbers of numpy are numbers too; all
    are kept as Python's. Raises InputError for a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        self._set("temperature", _number(self.temperature, 0, 100), "between 0 (greedy) and 100")
        self._set("top_p", _number(self.top_p, 0, 1) or None, "above 0 and at most 1")
        self._set("min_p", _number(self.min_p, 0, 1), "between 0 and 1")
        self._set("top_k", _count(self.top_k), "a whole number, 0 for no limit")

    def _set(self, name: str, value: object, expected: str) -> None:
        """Keep the checked value; None: what was given is not what was expected."""
        if value is None:
            raise InputError(f"{name}: expected {expected}, found {getattr(self, name)!r:.200}")
        object.__setattr__(self, name, value)  # the fields are frozen


@dataclass(frozen=True)
class SamplingOptions(Sampling):
    """How the next token is chosen, and where the answer ends.

    First the logits change: logit_bias, {token id: -100 to 100}, is added (the ids may be texts, as
    the keys of JSON are); of each token that this answer has so far, frequency_penalty times how
    often it came, and presence_penalty once, are subtracted (-2 to 2 each, OpenAI's definition; the
    prompt does not count). Then the token is drawn, see Sampling.

    logprobs: None or False for none, 0 or True for that of each token, n for n alternatives beside.
    stop, a string or several, ends an answer where its text has one, which is left out: the text of
    all tokens in `Model.generate`, that of channel final in `Model.chat`. stop_ids, any iterable of
    token ids, end it in addition to the model's own.

    stop_ids are kept as a frozenset, stop as a tuple. Raises InputError for a value out of its
    range.
    """

    seed: int | None = None
    logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.logprobs, bool | np.bool_):
            object.__setattr__(self, "logprobs", 0 if self.logprobs else None)
        if self.logprobs is not None:
            self._set("logprobs", _count(self.logprobs), "a number of alternatives, True or None")
        if self.seed is not None:
            self._set("seed", _count(self.seed), "None or a whole number >= 0")
        self._set("stop_ids", _ids(self.stop_ids), "token ids, whole numbers >= 0")
        self._set("stop", _texts(self.stop), "a string or strings, none of them empty")
        bias = f"numbers from {-MAX_BIAS} to {MAX_BIAS} by token id"
        self._set("logit_bias", _bias(self.logit_bias), bias)
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = _number(getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
            self._set(name, penalty, f"between {-MAX_PENALTY} and {MAX_PENALTY}")

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are not chosen from the model's own distribution."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty)


def _number(value: object, low: float, high: float) -> float | None:
    """A real number from `low` to `high` as Python's; None for anything else."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float can hold
        return None
    return number if low <= number <= high else None


def _count(value: object) -> int | None:
    """A whole number from 0 on as Python's; None for anything else."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        return None
    return int(value)


def _ids(values: object) -> frozenset[int] | None:
    """Counts; None if there is anything else among them, or if they are none."""
    if not isinstance(values, Iterable) or isinstance(values, bytes):
        return None
    ids = [_count(value) for value in values]
    counts = frozenset(id for id in ids if id is not None)
    return None if None in ids else counts


def _texts(values: object) -> tuple[str, ...] | None:
    """One text or several, in which an empty one would be found everywhere."""
    if isinstance(values, str):
        values = (values,)
    if not isinstance(values, Iterable) or isinstance(values, Mapping):
        return None
    texts = tuple(values)
    return texts if all(isinstance(text, str) and text for text in texts) else None


def _bias(values: Any) -> dict[int, float] | None:
    if not isinstance(values, Mapping):
        return None
    ids = [int(id) if isinstance(id, str) and _DIGITS.fullmatch(id) else id for id in values]
    biases = [_number(value, -MAX_BIAS, MAX_BIAS) for value in values.values()]
    bias = dict(zip(map(_count, ids), biases, strict=True))
    checked = {id: value for id, value in bias.items() if id is not None and value is not None}
    return checked if len(checked) == len(values) else None
