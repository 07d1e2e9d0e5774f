"""What of a prompt is not computed again, and that the answer is a fresh model's all the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reference import relative_rms

import osscompile
from osscompile.runtime import Model, load
from osscompile.targets import Target

SAME = 1e-5  # relative rms between two ways to compute the same in float32


class Pair:
    """A model that keeps what it computed, and one that forgets."""

    def __init__(self, path: Path) -> None:
        self.model, self.fresh = load(path), load(path)

    def ids(self, seed: int, count: int) -> list[int]:
        return np.random.default_rng(seed).integers(0, self.model.vocab_size, count).tolist()

    def prompt(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt were kept."""
        logits = self.model.prefill(ids)
        self.check(logits, ids)
        return self.model.cached_tokens

    def decode(self, ids: list[int], new: Sequence[int]) -> list[int]:
        """The tokens with new ones, each decoded."""
        for token in new:
            logits = self.model.decode(token)
        ids = [*ids, *new]
        self.check(logits, ids)
        return ids

    def check(self, logits: np.ndarray, ids: Sequence[int]) -> None:
        self.fresh.forget()
        assert relative_rms(logits, self.fresh.prefill(ids)) < SAME


@pytest.fixture(scope="module")
def path(this_machine: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prefixes") / "nano.osc"
    options = {"profile": "exact", "context": 6144, "variants": [this_machine.variant]}
    return osscompile.compile("nano", this_machine.name, output, **options)  # type: ignore[arg-type]


@pytest.fixture
def pair(path: Path) -> Pair:
    return Pair(path)


def test_a_next_turn(pair: Pair) -> None:
    ids = pair.ids(0, 700)
    assert pair.prompt(ids) == 0
    ids = pair.decode(ids, pair.ids(1, 30))
    assert pair.prompt([*ids, *pair.ids(2, 200)]) == 730


def test_an_edited_message_in_the_middle(pair: Pair) -> None:
    ids = pair.ids(3, 1500)
    pair.prompt(ids)
    assert pair.prompt([*ids[:1000], *pair.ids(4, 400)]) >= 1000 - 64


def test_a_branch_and_back(pair: Pair) -> None:
    ids = pair.ids(5, 900)
    pair.prompt(ids)
    branch = [*ids[:870], *pair.ids(6, 100)]
    assert pair.prompt(branch) == 870
    assert pair.prompt([*ids, *pair.ids(7, 50)]) == 900
    assert pair.prompt([*branch, 1]) == 970


def test_a_tool_loop_keeps_its_prompt(pair: Pair) -> None:
    """The last turn drops 120 tokens of each of the calls: what was reasoned on the way."""
    prompt = pair.ids(8, 3000)
    pair.prompt(prompt)
    ids = pair.decode(prompt, pair.ids(9, 150))
    ids += pair.ids(10, 700)
    assert pair.prompt(ids) == 3150
    ids = pair.decode(ids, pair.ids(11, 150))
    ids += pair.ids(12, 900)
    assert pair.prompt(ids) == 4000
    ids = pair.decode(ids, pair.ids(13, 100))
    last = [*prompt, *ids[3120:3850], *ids[3970:4900], *ids[4980:], *pair.ids(14, 209)]
    assert pair.prompt(last) >= 3000


def test_two_models_in_one_process(path: Path) -> None:
    models: list[Model] = [load(path), load(path)]
    ids = np.random.default_rng(15).integers(0, models[0].vocab_size, 300).tolist()
    for model in models:
        model.prefill(ids)
    models[1].prefill(ids[:100])
    assert [model.cached_tokens for model in models] == [0, 99]
