"""What callers give to a model, checked before any work: expected, found, what to do."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from .errors import InputError
from .sampling_options import Sampling, SamplingOptions


def whole_number(name: str, value: object, most: int | None = None) -> int:
    """From 1 to `most`; numpy's numbers are numbers. Raises InputError."""
    try:
        number = _index(value)
    except TypeError:
        number = 0
    if number < 1 or (most is not None and number > most):
        limits = "from 1" if most is None else f"from 1 to {most}"
        more = "; for more, compile the model again with a larger --context" if most else ""
        raise InputError(f"{name}: expected a whole number {limits}, found {value!r}{more}")
    return number


def prompt_ids(token_ids: Sequence[int], vocab_size: int, context: int, compiled: int) -> list[int]:
    """Ids of a prompt, at least one and at most `context`, which was loaded of the `compiled`
    positions. Raises InputError."""
    try:
        if isinstance(token_ids, bytes | bytearray | memoryview):
            raise TypeError("bytes")
        ids = [_index(i) for i in token_ids]
    except TypeError as error:
        raise InputError(
            f"prompt: expected token ids, which `encode` makes of text, found other: {error}"
        ) from None
    if not ids:
        raise InputError("prompt: expected at least one token, found none")
    if len(ids) > context:
        raise InputError(
            f"prompt: expected at most {context} tokens, found {len(ids)}; shorten it, or "
            f"load with a larger context (this artifact was compiled for {compiled})"
        )
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise InputError(
            f"token ids: expected 0 to {vocab_size - 1}, found {wrong}; "
            "was the prompt encoded with another tokenizer?"
        )
    return ids


def sampling_options(
    options: Mapping[str, object], others: Iterable[str], vocab_size: int, defaults: Sampling
) -> SamplingOptions:
    """Options by name; None: as if it were not given. Raises InputError for one that there is not,
    naming those that there are, `others` among them, or out of its range."""
    known = [field.name for field in fields(SamplingOptions)]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        names = ", ".join([*others, *known])
        raise InputError(f"options: expected {names}, found {unknown[0]!r}")
    given = {name: value for name, value in options.items() if value is not None}
    checked = SamplingOptions(**(asdict(defaults) | given))
    wrong = next((id for id in checked.logit_bias if id >= vocab_size), None)
    if wrong is not None:
        raise InputError(f"logit_bias: expected token ids below {vocab_size}, found {wrong}")
    return checked


def _index(value: Any) -> int:
    """A whole number of any type. Raises TypeError, also for a truth value, which Python counts."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{value!r}, a truth value")
    return operator.index(value)
