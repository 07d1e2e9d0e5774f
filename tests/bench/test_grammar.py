"""Benchmark what a constraint costs a step: the mask of the next token and the token that came, at
the published vocabulary of 201,088 ids, where its ranks are at hand.

This is not part of the ordinary tests: run `pytest tests/bench/test_grammar.py`. A round is all of
an answer, `extra_info` holds microseconds a token: its processor time, since masks are computed
while the rest of the machine is busy.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from o200k import RANKS, write_o200k
from pytest_benchmark.fixture import BenchmarkFixture
from walks import Walks, of_schema

from osscompile.runtime.grammar import grammar_of
from osscompile.runtime.harmony.answer_grammar import answer_grammars
from osscompile.runtime.harmony.structured import read_response_format

VOCABULARY = 201_088
THOUGHTS = "The user wants JSON about Ann, who is 33: I answer in the form that was asked for.\n"
VALUE = {
    "name": "Ann Müller, who lives in Bern",
    "age": 33,
    "happy": True,
    "tags": ["b", "a"],
    "note": "She said that all is well, and that the weather is fine.",
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "happy": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
        "note": {"type": "string", "maxLength": 200},
    },
    "required": ["name", "age", "happy"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Walks:
    if RANKS not in os.environ:
        pytest.skip(f"needs o200k_base.tiktoken, in the folder that {RANKS} names")
    path: Path = tmp_path_factory.mktemp("o200k") / "tokenizer.json"
    return Walks(write_o200k(path), VOCABULARY)


@pytest.mark.parametrize("channel", ["analysis", "final"])
@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_mask(benchmark: BenchmarkFixture, walks: Walks, kind: str, channel: str) -> None:
    response_format = of_schema(SCHEMA) if kind == "json_schema" else {"type": kind}
    asked = read_response_format(response_format)
    assert asked is not None
    special, encode = walks.tokenizer.special, walks.tokenizer.encode
    grammars = answer_grammars(special, grammar_of(kind, asked), {})
    header = [special["<|channel|>"], *encode(channel), special["<|message|>"]]
    text = THOUGHTS * 5 if channel == "analysis" else json.dumps(VALUE, ensure_ascii=False)
    said = encode(text)
    seconds: list[float] = []

    def answer() -> None:
        constraint = walks.grammars.constraint(kind, grammars, header)
        before = time.thread_time()
        for token_id in said:
            constraint.mask()
            constraint.push(token_id)
        seconds.append((time.thread_time() - before) / len(said))
        assert constraint.error is None

    benchmark.pedantic(answer, rounds=20)
    benchmark.extra_info["us_per_token"] = f"{1e6 * min(seconds):.0f} to {1e6 * max(seconds):.0f}"
