"""Rows of many sequences in one step: logits alone and among others, batches, and little room."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from talker import CHUNK, CONTEXT, ids_of, random_ids

from osscompile.runtime import ArtifactError, GeneratedToken, InputError, Model, load
from osscompile.runtime.kv_cache import CachedSequence
from osscompile.runtime.runner import Rows
from osscompile.runtime.scheduler import Answer, Scheduler

CLOSE = 1e-5  # relative rms of logits, of the profile `exact`
# Of `fast`: sums in another order round a few activations to another int8. As much comes between a
# sequence that is computed alone token by token and all at once (2.6e-3 on nano).
CLOSE_IN_INT8 = 1e-2


@pytest.fixture
def model(talker: Path) -> Model:
    return load(talker, kv_memory=8 << 20)  # room for all that these tests compute at once


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.sqrt(np.mean((found - expected) ** 2))
    return float(error / np.sqrt(np.mean(expected**2)))


def on_device(model: Model, work: Callable[[], object]) -> None:
    model._driver.call(work)


class Sequences:
    """Sequences of random tokens that a runner computes together; every logit that it gives is
    compared with that of the sequence alone."""

    def __init__(
        self, model: Model, reference: Model, lengths: list[int], close: float = CLOSE
    ) -> None:
        self.close = close
        self.model, self.runner = model, model._runner
        self.tokens = [random_ids(length, seed=i) for i, length in enumerate(lengths)]
        self.expected = [reference.logits(tokens) for tokens in self.tokens]
        self.running: dict[int, CachedSequence] = {}

    def start(self, i: int, reused: int = 0) -> None:
        self.running[i] = self.runner.cache.start()
        assert self.running[i].reuse(self.tokens[i][:reused]) == reused

    def step(self, counts: dict[int, int], wanted: int | None = None) -> None:
        """So many more tokens of each, and the logits of all, or of the `wanted` last ones."""
        rows, expected = [], []
        for i, count in counts.items():
            sequence = self.running[i]
            end = sequence.length + count
            number = count if wanted is None else min(wanted, count)
            rows.append(Rows(sequence, self.tokens[i][end - count : end], number))
            expected.append(self.expected[i][end - number : end])
        wanted = sum(row.wanted for row in rows)
        logits = self.runner.device.numpy(self.runner.step(rows))[:wanted]
        assert relative_rms(logits, np.concatenate(expected)) < self.close

    def leave(self, i: int) -> None:
        self.runner.cache.leave(self.running.pop(i))


def test_logits_among_others_are_those_alone(model: Model, talker: Path) -> None:
    """Prompt chunks, single tokens and scored tokens, around the ends of pages and windows."""
    sequences = Sequences(model, load(talker), [150, 90, 40, 70, 10])

    def work() -> None:
        for i in range(4):
            sequences.start(i)
        sequences.step({0: 16, 1: 1, 2: 15})
        sequences.step({0: 1, 1: 30, 3: 1})
        sequences.step({3: 32}, wanted=1)
        sequences.step({0: 1, 1: 1, 2: 1, 3: 1})
        sequences.step({2: 1, 0: 1})
        sequences.leave(2)
        sequences.start(4)
        sequences.step({0: 20, 4: 9})
        sequences.step({4: 1})

    on_device(model, work)


def test_sequences_that_share_pages(model: Model, talker: Path) -> None:
    """One goes on from within a page that another writes."""
    sequences = Sequences(model, load(talker), [100, 100])
    sequences.tokens[1][:70] = sequences.tokens[0][:70]
    sequences.expected[1] = load(talker).logits(sequences.tokens[1])

    def work() -> None:
        sequences.start(0)
        for _ in range(2):
            sequences.step({0: 32}, wanted=1)
        sequences.step({0: 6})
        sequences.start(1, reused=70)
        assert sequences.running[0]._path[0] is sequences.running[1]._path[0]
        for _ in range(15):
            sequences.step({0: 1, 1: 2})

    on_device(model, work)


def test_logits_among_others_in_int8(nano_artifact: Path) -> None:
    model = load(nano_artifact, context=512, kv_memory=64 << 20)
    sequences = Sequences(model, load(nano_artifact), [130, 90, 40, 5], CLOSE_IN_INT8)

    def work() -> None:
        for i in range(4):
            sequences.start(i)
        sequences.step({0: 16, 1: 1, 2: 15, 3: 1})
        sequences.step({0: 100, 1: 1, 2: 2})
        for _ in range(3):
            sequences.step({0: 1, 1: 1, 2: 1, 3: 1})
        sequences.step({0: 1, 1: 70, 2: 1})

    on_device(model, work)


@pytest.mark.parametrize("seed", range(3))
def test_random_mixtures(model: Model, talker: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 120, 12).tolist()
    sequences = Sequences(model, load(talker), lengths)

    def work() -> None:
        left = list(range(12))
        while left or sequences.running:
            while left and rng.random() < 0.5:
                sequences.start(left.pop())
            counts: dict[int, int] = {}
            for i, sequence in sequences.running.items():
                room = CHUNK - sum(counts.values())
                more = min(lengths[i] - sequence.length, int(rng.choice([0, 1, 1, 1, 9])), room)
                if more:
                    counts[i] = more
            if counts:
                sequences.step(counts)
            for i in [i for i, s in sequences.running.items() if s.length == lengths[i]]:
                sequences.leave(i)

    on_device(model, work)


# --- Batches ----------------------------------------------------------------------------------


def texts_of(answers: list[list[GeneratedToken]]) -> list[list[int]]:
    return [[token.token_id for token in answer] for answer in answers]


def test_a_batch_says_what_each_prompt_says_alone(model: Model, talker: Path) -> None:
    prompts = [random_ids(length, seed=length) for length in (1, 40, 100, 17, 64, 65, 2, 33)]
    fresh = load(talker)
    alone = [ids_of(fresh.generate(prompt, max_tokens=12)) for prompt in prompts]
    assert texts_of(model.generate_batch(prompts, max_tokens=12)) == alone
    assert texts_of(model.generate_batch(prompts, max_tokens=12)) == alone  # from the cache


def test_more_prompts_than_run_at_once(model: Model) -> None:
    prompts = [random_ids(3, seed=i) for i in range(2 * model.manifest.most_wanted + 1)]
    answers = model.generate_batch(prompts, max_tokens=3)
    assert [len(answer) for answer in answers] == [3] * len(prompts)
    assert all(answer[-1].finish_reason for answer in answers)
    assert all(answer[-1].usage.completion_tokens == 3 for answer in answers)


def test_no_prompts(model: Model) -> None:
    assert model.generate_batch([]) == []


def test_wrong_prompts_are_refused_before_work(model: Model) -> None:
    with pytest.raises(InputError, match="prompt"):
        model.generate_batch([[1], []])
    with pytest.raises(InputError, match="options"):
        model.generate_batch([[1]], heat=1)


def test_a_batch_ends_a_generation_and_leaves_the_model_usable(model: Model, talker: Path) -> None:
    stream = model.generate(random_ids(20), max_tokens=20)
    next(stream)
    model.generate_batch([random_ids(30), random_ids(40)], max_tokens=2)
    with pytest.raises(InputError, match="took over the KV cache"):
        next(stream)
    expected = load(talker).prefill(random_ids(50))
    np.testing.assert_allclose(model.prefill(random_ids(50)), expected, atol=1e-4)
    assert len(model._runner.cache.running) == 1


def test_seeds_in_a_batch(model: Model, talker: Path) -> None:
    prompts = [random_ids(9, seed=i) for i in range(3)]
    options = {"max_tokens": 8, "temperature": 1.0, "seed": 5}
    fresh = load(talker)
    alone = [ids_of(fresh.generate(prompt, **options)) for prompt in prompts]
    assert texts_of(model.generate_batch(prompts, **options)) == alone


# --- Little room ------------------------------------------------------------------------------


def answer_of(model: Model, prompt: list[int], limit: int, told: list[GeneratedToken]) -> Answer:
    question = model._questions.of_ids(prompt, max_tokens=limit, temperature=0)
    return Answer(question, model._questions.sampler(question), told.append)


def with_few_pages(model: Model, full: int, window: int) -> None:
    """Leave the cache so many pages."""
    pages = model._runner.cache._pages
    pages._counts = (full, window)
    pages.count(model._runner.cache.root, [])


def test_the_youngest_waits_when_pages_run_out(model: Model, talker: Path) -> None:
    """Room for one whole context is enough for any number of answers."""
    fresh, prompts = load(talker), [random_ids(60 + i, seed=i) for i in range(6)]
    alone = [ids_of(fresh.generate(prompt, max_tokens=40)) for prompt in prompts]
    answers: list[list[GeneratedToken]] = [[] for _ in prompts]
    asked = [answer_of(model, p, 40, told) for p, told in zip(prompts, answers, strict=True)]

    def work() -> None:
        page = model.manifest.page_tokens
        with_few_pages(model, CONTEXT // page + 1, CONTEXT // page + 1)
        scheduler = Scheduler(model._runner, CHUNK, 6)
        waited = []
        wait = scheduler._wait
        scheduler._wait = lambda answer: (waited.append(answer), wait(answer))  # type: ignore
        scheduler.run(asked)
        assert waited

    on_device(model, work)
    assert texts_of(answers) == alone


def test_cancelled_answers_leave_their_pages(model: Model) -> None:
    told: list[list[GeneratedToken]] = [[] for _ in range(4)]
    answers = [answer_of(model, random_ids(50, seed=i), 200, told[i]) for i in range(4)]

    def work() -> None:
        scheduler = Scheduler(model._runner, CHUNK, 3)
        for answer in answers:
            scheduler.add(answer)
        for _ in range(10):
            scheduler.step()
        answers[0].cancelled = answers[3].cancelled = True
        scheduler.step()
        assert answers[0].sequence is None and answers[1].sequence is not None
        assert len(model._runner.cache.running) == 3  # with the model's own
        scheduler.end_all(None)
        assert not scheduler.has_work and len(model._runner.cache.running) == 1

    on_device(model, work)
    assert told[1] and not told[3]


def test_an_error_of_the_device_ends_all(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ArtifactError("a device that does not work")

    with monkeypatch.context() as patch:
        patch.setattr(model._runner.device, "run", fail)
        with pytest.raises(ArtifactError, match="does not work"):
            model.generate_batch([[1], [2]], max_tokens=3)
    assert len(model.generate_batch([[1], [2]], max_tokens=3)) == 2


@pytest.mark.parametrize(
    ("missing", "rows"),
    [
        ([1, 1], [1, 1]),
        ([100, 1], [31, 1]),  # CHUNK is 32
        ([100, 5], [27, 5]),  # a short prompt beside a long one, which loses no more than it takes
        ([100, 90], [16, 16]),
        ([100, 90, 5], [16, 11, 5]),
        ([90, 90, 90], [32, 0, 0]),  # of equals the oldest
        ([3, 2], [3, 2]),
        ([1, 2, 40, 1], [1, 2, 28, 1]),
    ],
)
def test_rows_of_a_step(model: Model, missing: list[int], rows: list[int]) -> None:
    assert Scheduler(model._runner, CHUNK, 16)._share(missing) == rows


def test_a_short_prompt_is_told_while_a_long_one_is_read(model: Model) -> None:
    questions = model._questions
    asked = [questions.of_ids(random_ids(count), max_tokens=1) for count in (5 * CHUNK, 3)]
    told: list[GeneratedToken] = []
    long, short = (Answer(q, questions.sampler(q), told.append) for q in asked)
    scheduler = Scheduler(model._runner, CHUNK, 16)
    scheduler.add(long)
    on_device(model, scheduler.step)
    scheduler.add(short)
    on_device(model, scheduler.step)
    assert len(told) == 1 and short.sequence is None and long.missing() > 2 * CHUNK
    on_device(model, lambda: scheduler.end_all(None))


# --- What is not a number ---------------------------------------------------------------------


def spoil(model: Model, sequence: CachedSequence, page: int) -> None:
    """Keys and values of a page, as a fault of the weights or the device may leave them."""
    node = sequence.path[page]
    for i, array in enumerate(model._runner.cache.arrays):
        array[node.window if model.manifest.sliding[i // 2] else node.full] = np.nan


def check_no_page_is_spoiled(model: Model) -> None:
    cache = model._runner.cache
    assert not any(np.isnan(array).any() for array in cache.arrays)
    cache._count()
    free = cache._pages._free[0]
    held = [node.full for node in cache.root.below()]
    assert sorted([*free, *held]) == list(range(cache._pages._counts[0]))


class Asked:
    """Answers that a scheduler computes, what each is told, and how it ended."""

    def __init__(self, model: Model, prompts: list[list[int]], limit: int) -> None:
        self.told: list[list[GeneratedToken]] = [[] for _ in prompts]
        self.errors: list[BaseException | str | None] = ["none yet"] * len(prompts)
        self.scheduler = Scheduler(model._runner, CHUNK, len(prompts))
        self.answers = []
        for i, prompt in enumerate(prompts):
            question = model._questions.of_ids(prompt, max_tokens=limit, temperature=0)
            sampler = model._questions.sampler(question)
            end = partial(self.errors.__setitem__, i)
            self.answers.append(Answer(question, sampler, self.told[i].append, end))
            self.scheduler.add(self.answers[-1])

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.scheduler.step()


def test_what_is_not_a_number_ends_its_answer_alone(model: Model, talker: Path) -> None:
    fresh, prompts = load(talker), [random_ids(70 + i, seed=i) for i in range(3)]
    alone = [ids_of(fresh.generate(prompt, max_tokens=20)) for prompt in prompts]

    def work() -> None:
        asked = Asked(model, prompts, 20)
        while not all(len(told) > 3 for told in asked.told):
            asked.scheduler.step()
        middle = asked.answers[1].sequence
        assert middle is not None
        spoil(model, middle, 1)
        said = len(asked.told[1])
        asked.finish()
        assert len(asked.told[1]) == said and texts_of(asked.told)[1] == alone[1][:said]
        assert isinstance(asked.errors[1], ArtifactError) and "nan" in str(asked.errors[1])
        assert asked.errors[::2] == [None, None]
        assert texts_of(asked.told)[::2] == alone[::2]
        check_no_page_is_spoiled(model)

    on_device(model, work)
    assert texts_of(model.generate_batch(prompts, max_tokens=20)) == alone


def test_a_spoiled_page_that_answers_share_is_forgotten_with_the_last(
    model: Model, talker: Path
) -> None:
    """It came from an answer that ended before anybody saw what it is."""
    begin = random_ids(64)
    prompts = [[*begin, *random_ids(9, seed=i)] for i in range(1, 4)]
    alone = [ids_of(load(talker).generate(prompt, max_tokens=4)) for prompt in prompts]
    other = random_ids(80, seed=9)

    def work() -> None:
        sequence = model._runner.cache.start()
        model._runner.step([Rows(sequence, begin[:32])])
        model._runner.step([Rows(sequence, begin[32:])])
        sequence.keep()
        spoil(model, sequence, 0)
        model._runner.cache.leave(sequence)
        asked = Asked(model, [*prompts, other], 4)
        asked.finish()
        assert all(isinstance(error, ArtifactError) for error in asked.errors[:3])
        assert asked.errors[3] is None and len(asked.told[3]) == 4
        check_no_page_is_spoiled(model)

    on_device(model, work)
    assert texts_of(model.generate_batch(prompts, max_tokens=4)) == alone
