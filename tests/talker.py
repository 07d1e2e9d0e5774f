"""A small random model with nano's tokenizer, for tests that generate and chat."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from artifacts import VARIANTS_HERE
from numpy.typing import NDArray
from random_model import random_model, write_checkpoint

import osscompile
import osscompile.nano
from osscompile.runtime import GeneratedToken, Model
from osscompile.runtime.sampler import reserved_ids
from osscompile.runtime.tokenizer import Tokenizer

TOKENIZER = Path(osscompile.nano.__file__).parent / "checkpoint" / "tokenizer.json"
WINDOW, CHUNK, CONTEXT = 16, 32, 256
PADDING_ROWS = 24  # logits beyond the tokenizer's table


def compile_talker(
    target: str, folder: Path, variants: Sequence[str] | None = VARIANTS_HERE
) -> Path:
    """Compile a random model that would say reserved ids most of the time."""
    tokenizer = Tokenizer(TOKENIZER)
    vocab = tokenizer.vocab_size + PADDING_ROWS
    config, tensors = random_model(layers=2, window=WINDOW, vocab=vocab)
    reserved = reserved_ids(tokenizer.special, vocab, tokenizer.vocab_size)
    head = tensors["lm_head.weight"]
    head[reserved] = (8 * head[reserved].astype(np.float32)).astype(head.dtype)
    checkpoint = write_checkpoint(folder / "checkpoint", config, tensors)
    shutil.copy(TOKENIZER, checkpoint)
    (checkpoint / "generation_config.json").write_text('{"do_sample": false}')
    return osscompile.compile(
        checkpoint,
        target,
        folder / "talker.osc",
        variants=variants,
        profile="exact",
        context=CONTEXT,
        prefill_chunk=CHUNK,
    )


def random_ids(count: int, seed: int = 0) -> list[int]:
    """Return random ordinary tokens."""
    return np.random.default_rng(seed).integers(0, 1000, count).tolist()


def ids_of(tokens: Iterator[GeneratedToken]) -> list[int]:
    return [token.token_id for token in tokens]


def allowed_logits(model: Model, ids: list[int]) -> NDArray[np.float64]:
    """Return logits [n, vocab], computed anew; -inf for ids that must not be said."""
    logits = model.logits(ids).astype(np.float64)
    assert model.tokenizer is not None
    special, size = model.tokenizer.special, model.tokenizer.vocab_size
    logits[:, reserved_ids(special, model.vocab_size, size)] = -np.inf
    return logits


def say(model: Model, ids: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let the network say these ids for any prompt; returns the list of the prompts it gets."""
    return say_each(model, itertools.repeat(ids), monkeypatch)


def say_each(
    model: Model, answers: Iterable[Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """The same, with one of these answers after the other."""
    rest: list[int] = []
    prompts: list[list[int]] = []
    left = iter(answers)

    def next_logits(_: object = None) -> NDArray[np.float32]:
        logits = np.zeros((1, model.vocab_size), np.float32)
        logits[0, rest.pop(0)] = 1
        return logits

    def start(prompt: list[int]) -> NDArray[np.float32]:
        prompts.append(prompt)
        rest[:] = next(left)
        return next_logits()

    monkeypatch.setattr(model, "_prefill", start)
    monkeypatch.setattr(model, "_decode", next_logits)
    return prompts
