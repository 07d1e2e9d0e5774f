"""An interrupt anywhere leaves nothing wrong: the next answer is that of a fresh model.

Signals reach the main thread only; here they strike in the thread that drives the device too.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from talker import CHUNK, random_ids

from osscompile.runtime import InputError, Model, kv_cache, load, runner
from osscompile.runtime import model as model_file
from osscompile.runtime.devices import driver

MOST_TIMES = 3  # that each line is struck: the first times that it runs
CACHE_FILES = {model_file.__file__, runner.__file__, kv_cache.__file__}
PROMPT = random_ids(90)
EDITED = [*PROMPT[:85], *random_ids(5, seed=1)]
LONGER = [*PROMPT, *random_ids(6, seed=2)]
OTHER = random_ids(40, seed=3)
PROBES: tuple[list[int], ...] = (LONGER, EDITED, OTHER)


class History:
    """What the cache went through, and the tokens that `decode` goes on from; None while an answer
    is generated, which may hold more than was told."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.tokens: list[int] | None = []

    def run(self) -> None:
        """A prompt, an answer that leads far from it, the way back, and an empty cache."""
        self._prefill(PROMPT)
        self._decode(5)
        self._generate(LONGER, CHUNK + 9)
        self._prefill(EDITED)  # by the snapshot
        self._model.forget()
        self.tokens = []
        self._decode(7)
        self._model.logits(OTHER)
        self.tokens = OTHER
        self._generate(PROMPT, 3)

    def _prefill(self, ids: list[int]) -> None:
        self._model.prefill(ids)
        self.tokens = ids

    def _decode(self, token: int) -> None:
        assert self.tokens is not None
        self._model.decode(token)
        self.tokens = [*self.tokens, token]

    def _generate(self, ids: list[int], count: int) -> None:
        self.tokens = None
        said = [token.token_id for token in self._model.generate(ids, max_tokens=count)]
        self.tokens = ids + said[:-1]  # the last that was said is not computed yet


class Answers:
    """Logits that a model has whose cache nothing has used."""

    def __init__(self, talker: Path) -> None:
        self._model, self._known = load(talker), dict[tuple[int, ...], np.ndarray]()

    def __call__(self, ids: list[int]) -> np.ndarray:
        key = tuple(ids)
        if key not in self._known:
            self._model.forget()
            self._known[key] = self._model.prefill(ids).copy()
        return self._known[key]


@pytest.fixture(scope="module")
def model(talker: Path) -> Model:
    return load(talker)


@pytest.fixture(scope="module")
def answers(talker: Path) -> Answers:
    return Answers(talker)


@contextmanager
def at_each_line(
    model: Model, files: set[str], strike: Callable[[str, int], None]
) -> Iterator[None]:
    """Call `strike` with the file and number of each line that runs of `files` in this thread, and
    of those that work with the cache in the thread of the device."""

    def trace(files: set[str]) -> Callable[..., Any]:
        def enter(frame: FrameType, event: str, _: object) -> Any:
            return line if frame.f_code.co_filename in files else None

        def line(frame: FrameType, event: str, _: object) -> Any:
            if event == "line":
                strike(frame.f_code.co_filename, frame.f_lineno)
            return line

        return enter

    before = sys.gettrace()
    model._driver.call(lambda: sys.settrace(trace(files & CACHE_FILES)))
    sys.settrace(trace(files))
    try:
        yield
    finally:
        sys.settrace(before)
        model._driver.call(lambda: sys.settrace(None))


def test_interrupt_at_every_line(
    model: Model, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which line runs how often must not depend on how busy the machine is: a caller wakes once."""
    monkeypatch.setattr(driver, "SIGNAL_SECONDS", threading.TIMEOUT_MAX)
    files = CACHE_FILES | {driver.__file__}
    times: Counter[tuple[str, int]] = Counter()
    with at_each_line(model, files, lambda file, number: times.update([(file, number)])):
        History(model).run()
    assert {file for file, _ in times} == files
    struck = [
        (event, nth) for event, n in times.items() for nth in range(1, min(n, MOST_TIMES) + 1)
    ]
    for index, (event, nth) in enumerate(struck):
        model.forget()
        history, left = History(model), itertools.count(nth - 1, -1)

        def strike(file: str, number: int, event: Any = event, left: Any = left) -> None:
            if (file, number) == event and next(left) == 0:
                raise KeyboardInterrupt

        where = f"{Path(event[0]).name}:{event[1]}, time {nth}"
        with pytest.raises(KeyboardInterrupt), at_each_line(model, files, strike):
            history.run()
        assert answers_another_thread(), where
        probes = (PROBES * 2)[index % 3 :][:2]
        if history.tokens is not None:
            next_tokens = [*history.tokens, 9]
            probes = (next_tokens, *probes)
            try:
                check(model.decode(9), answers(next_tokens), f"decode, {where}")
            except InputError:
                pass  # it says that this is uncertain
        for probe in probes:
            check(model.prefill(probe), answers(probe), where)


def answers_another_thread() -> bool:
    """Whether an interrupt left nothing locked that every caller needs."""
    answered: list[int] = []
    thread = threading.Thread(target=lambda: answered.append(driver.driver().call(lambda: 5)))
    thread.daemon = True  # if it waits for ever, the test does not
    thread.start()
    thread.join(timeout=60)
    return answered == [5]


def check(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=where)


def test_caller_waits_for_what_is_in_flight() -> None:
    """A kernel cannot be interrupted, and what follows it is not begun."""
    done: list[str] = []
    line = driver.driver()

    def work() -> None:
        main = threading.main_thread()
        assert main.ident is not None and threading.current_thread() is not main
        signal.pthread_kill(main.ident, signal.SIGINT)  # as Ctrl-C
        while not line._current.abandoned:  # type: ignore[union-attr]
            pass
        done.append("first kernel")
        line.check()
        done.append("second kernel")

    with pytest.raises(KeyboardInterrupt):
        line.call(work)
    assert done == ["first kernel"]
    assert line.call(lambda: 5) == 5
