"""Callers of any thread, processes that fork, and how many threads compute."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import run_python
from talker import ids_of, random_ids

from osscompile.runtime import InputError, Model, OsscompileError, load
from osscompile.runtime.devices import driver
from osscompile.runtime.machine import usable_threads

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")


@pytest.fixture(scope="module")
def model(talker: Path) -> Model:
    return load(talker)


def test_two_threads_at_once(model: Model) -> None:
    prompts = [random_ids(40, seed=seed) for seed in range(4)]
    expected = [model.logits(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(model.logits, prompts), expected, strict=True):
                np.testing.assert_array_equal(found, right)


def test_threads_take_a_generation_over_from_each_other(model: Model) -> None:
    """Each answer is right as far as it goes, and ends with an error that says why."""
    prompts = [random_ids(30, seed=seed) for seed in range(3)]
    expected = [ids_of(model.generate(prompt, max_tokens=30)) for prompt in prompts]

    def answer(number: int) -> bool:
        said: list[int] = []
        try:
            for token in model.generate(prompts[number], max_tokens=30):
                said.append(token.token_id)
        except InputError as error:
            assert "expected to be the last call that uses this model" in str(error)
        assert said == expected[number][: len(said)]
        return len(said) == len(expected[number])

    with ThreadPoolExecutor(3) as pool:
        assert any(pool.map(answer, range(3)))  # whoever came last


def test_a_generation_goes_on_in_another_thread(model: Model) -> None:
    prompt = random_ids(30)
    expected = ids_of(model.generate(prompt, max_tokens=12))
    stream = model.generate(prompt, max_tokens=12)
    with ThreadPoolExecutor(1) as pool:
        found = [pool.submit(next, stream).result().token_id for _ in range(6)]
    assert found + ids_of(stream) == expected


@pytest.mark.parametrize("ask", ["generate", "chat"])
def test_two_threads_in_one_generation(model: Model, ask: str) -> None:
    """Whoever is second is told; the first goes on."""
    prompt: Any = random_ids(30) if ask == "generate" else [{"role": "user", "content": "Hi"}]
    expected = list(getattr(model, ask)(prompt, max_tokens=12))
    stream: Any = getattr(model, ask)(prompt, max_tokens=12)
    busy, free = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            pool.submit(model._driver.call, lambda: (busy.set(), free.wait()))
            busy.wait()
            first = pool.submit(list, stream)
            while not stream._generator.gi_running and not first.done():
                time.sleep(0.01)
            for again in (stream.__next__, stream.close):
                with pytest.raises(InputError, match="one thread at a time, found another"):
                    again()
        finally:
            free.set()
        assert first.result() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_that_end_leave_none_behind(talker: Path, model: Model) -> None:
    def use() -> None:
        load(talker).logits([1, 2])
        model.logits([1, 2])

    use()
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    deadline = time.monotonic() + 10  # the system may list a thread a little longer
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/task")) <= before


def test_call_from_within_a_call(model: Model) -> None:
    """As a finalizer may make it: it would wait for itself."""
    with pytest.raises(OsscompileError, match="from within a call"):
        model._driver.call(model.forget)


FORKED = """
import os, sys
from osscompile.runtime import OsscompileError, load
model = load(sys.argv[1])
expected = model.logits([1, 2, 3])
stream = model.generate([1, 2, 3])
next(stream)
child = os.fork()
if child == 0:
    code = 1
    try:
        for use in (model.forget, lambda: model.logits([1]), lambda: next(stream)):
            try:
                use()
            except OsscompileError as error:
                assert "a fork" in str(error) and "load the model in the new process" in str(error)
            else:
                sys.exit("no error")
        assert (load(sys.argv[1]).logits([1, 2, 3]) == expected).all()
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
assert (model.logits([1, 2, 3]) == expected).all()
"""


@needs_fork
def test_fork_after_a_load(talker: Path, tmp_path: Path) -> None:
    """A fork has no thread but its own: it is told to load a model, and can."""
    run_python(FORKED, talker, cwd=tmp_path)


def test_fork_of_a_process_that_uses_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver's state was copied, and would be used by both."""
    monkeypatch.setattr(driver, "_devices_of", [os.getppid()])
    with pytest.raises(OsscompileError, match=r"found a fork of one that uses a device.*`spawn`"):
        driver.forbid_fork()


LEFT = """
import sys, threading
from osscompile.runtime import load
model = load(sys.argv[1])
started = threading.Event()
def use():
    while True:
        model.logits([1] * 200)
        started.set()
threading.Thread(target=use, daemon=True).start()
started.wait()
"""


def test_the_process_ends_while_a_thread_computes(talker: Path, tmp_path: Path) -> None:
    run_python(LEFT, talker, cwd=tmp_path)


LATE = """
import atexit, sys
uses = []
atexit.register(lambda: [attempt(use) for use in uses])
from osscompile.runtime import Engine, OsscompileError, load

def attempt(use):
    try:
        use()
    except OsscompileError as error:
        print(str(error).split(",")[0])

class Late:  # an object of a module, whose names with an underscore go first
    artifact = sys.argv[1]

    def __del__(self):
        attempt(lambda: load(self.artifact))

_late = Late()
if sys.argv[2] == "loaded":
    model, engine = load(sys.argv[1]), Engine(sys.argv[1])
    stream = model.generate([1, 2, 3])
    next(stream)
    answer = engine.submit([1, 2, 3], max_tokens=200)
    uses += [model.forget, lambda: next(stream), lambda: load(sys.argv[1])]
    uses += [lambda: engine.submit([1]), lambda: list(answer)]
"""
ENDS = "model: expected a call before the end of the process"
CLOSED = "engine: expected one that is open", "engine: it was closed"


@pytest.mark.parametrize(
    ("before", "told"), [("loaded", [ENDS, ENDS, ENDS, *CLOSED, ENDS]), ("nothing", [ENDS])]
)
def test_calls_at_the_end_of_the_process(
    talker: Path, tmp_path: Path, before: str, told: list[str]
) -> None:
    """An exit handler that was registered first runs last, and finalizers after it: the thread that
    would serve them has ended."""
    result = run_python(LATE, talker, before, cwd=tmp_path, timeout=60)
    assert (result.stdout.splitlines(), result.stderr) == (told, "")


def test_more_threads_than_can_run(talker: Path, model: Model) -> None:
    most = usable_threads()
    with pytest.warns(UserWarning, match=f"threads: expected at most {most}.*, found 1000"):
        many = load(talker, threads=1000)
    np.testing.assert_array_equal(many.logits([1, 2, 3]), model.logits([1, 2, 3]))


def test_tvm_is_told_of_more_threads_than_can_run(talker: Path, tmp_path: Path) -> None:
    code = """
import sys, warnings
from osscompile.runtime import load
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    load(sys.argv[1]).logits([1])
assert any("TVM_NUM_THREADS: expected at most" in str(w.message) for w in caught), caught
"""
    run_python(code, talker, cwd=tmp_path, env={"TVM_NUM_THREADS": "1000"})


@pytest.mark.parametrize("first", [1, 2])
def test_models_with_threads_of_their_own(talker: Path, first: int) -> None:
    """One after the other computes with its number of threads."""
    one, other = load(talker, threads=first), load(talker, threads=3 - first)
    np.testing.assert_allclose(one.logits([1, 2, 3]), other.logits([1, 2, 3]), atol=1e-4)
    np.testing.assert_allclose(one.logits([1, 2, 3]), other.logits([1, 2, 3]), atol=1e-4)
