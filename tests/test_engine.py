"""Many callers of one engine: from threads and event loops, that cancel, forget, and go on."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from talker import ids_of, random_ids

from osscompile.runtime import (
    ArtifactError,
    Engine,
    Finish,
    GeneratedToken,
    InputError,
    Model,
    OsscompileError,
    Request,
    load,
    scheduler,
)
from osscompile.runtime.bench.machine import process_bytes
from osscompile.runtime.questions import Questions

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
PATIENCE = 60.0  # seconds, after which a test has hung


@pytest.fixture
def engine(talker: Path) -> Iterator[Engine]:
    with Engine(talker, sequences=4) as engine:
        yield engine


def wait_until_idle(engine: Engine) -> None:
    end = time.monotonic() + PATIENCE
    while engine._work.scheduler.has_work:
        assert time.monotonic() < end
        time.sleep(0.01)


def check_books(engine: Engine) -> None:
    """Once an engine is idle, no sequence runs but that of its model, and every page is free, or
    one node of the tree holds it."""
    wait_until_idle(engine)
    cache = engine._work.scheduler._runner.cache
    assert len(cache.running) == 1
    cache._count()
    nodes = list(cache.root.below())
    full, window = cache._pages._free
    windows = [node.window for node in nodes if node.window is not None]
    assert sorted([*full, *(node.full for node in nodes)]) == list(range(cache._pages._counts[0]))
    assert sorted([*window, *windows]) == list(range(cache._pages._counts[1]))


def test_requests_say_what_a_model_says_alone(engine: Engine, talker: Path) -> None:
    model = load(talker)
    prompts = [random_ids(length, seed=length) for length in (1, 90, 30, 64, 2, 17)]
    requests = [engine.submit(prompt, max_tokens=10, temperature=0) for prompt in prompts]
    for prompt, request in zip(prompts, requests, strict=True):
        expected = list(model.generate(prompt, max_tokens=10, temperature=0))
        assert list(request) == expected
        assert request.finish_reason == expected[-1].finish_reason
        assert request.usage.prompt_tokens == len(prompt)
        assert request.usage.completion_tokens == len(expected)
    check_books(engine)


def test_a_chat_says_what_a_model_says_alone(nano_artifact: Path) -> None:
    expected = list(load(nano_artifact).chat(QUESTION, current_date=None))
    with Engine(nano_artifact) as engine:
        first, second = (engine.submit(QUESTION, current_date=None) for _ in range(2))
        assert list(first) == list(second) == expected
        assert isinstance(expected[-1], Finish)
        assert first.usage.reasoning_tokens == expected[-1].usage.reasoning_tokens > 0
        again = engine.submit(QUESTION, current_date=None)
        list(again)
        assert again.cached_tokens == again.usage.prompt_tokens - 1
        stopped = engine.submit(QUESTION, current_date=None, stop="42")
        assert "42" not in "".join(p.text for p in stopped if p.channel == "final")
        assert stopped.finish_reason == "stop"
        check_books(engine)


def test_many_threads(engine: Engine, talker: Path) -> None:
    model, answers = load(talker), dict[int, list[int]]()

    def ask(i: int) -> None:
        answers[i] = ids_of(iter(engine.submit(random_ids(5 + i, seed=i), max_tokens=6)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for i in range(20):
        assert answers[i] == ids_of(model.generate(random_ids(5 + i, seed=i), max_tokens=6))


def test_an_event_loop_goes_on_meanwhile(engine: Engine, talker: Path) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def ask(i: int) -> list[int]:
        request = engine.submit(random_ids(9, seed=i), max_tokens=5, temperature=0)
        return [token.token_id async for token in request]

    async def main() -> list[list[int]]:
        ticking = asyncio.create_task(tick())
        answers = await asyncio.wait_for(asyncio.gather(*map(ask, range(8))), PATIENCE)
        ticking.cancel()
        return answers

    answers = asyncio.run(main())
    model = load(talker)
    for i, answer in enumerate(answers):
        assert answer == ids_of(model.generate(random_ids(9, seed=i), max_tokens=5, temperature=0))
    assert ticks > 10


def test_cancelling(engine: Engine) -> None:
    requests = [engine.submit(random_ids(20, seed=i), stop_ids=[]) for i in range(6)]
    first = iter(requests[0])
    next(first)
    for request in requests:
        request.cancel()
    list(first)
    check_books(engine)
    assert {r.finish_reason for r in requests} <= {"cancelled", "stop"}
    assert "cancelled" in {r.finish_reason for r in requests}


def test_a_request_that_nobody_holds_is_cancelled(engine: Engine) -> None:
    for token in engine.submit(random_ids(20)):
        assert isinstance(token, GeneratedToken)
        break
    engine.submit(random_ids(30))
    gc.collect()
    check_books(engine)


def test_an_abandoned_event_loop(engine: Engine) -> None:
    async def main() -> None:
        async for _ in engine.submit(random_ids(20)):
            break

    asyncio.run(main())
    gc.collect()
    check_books(engine)


def test_ids_of_any_iterable(engine: Engine) -> None:
    """As `Model.generate` takes them."""
    prompt = random_ids(9)
    for ids in (prompt, iter(prompt), np.array(prompt)):
        answer = list(engine.submit(ids, max_tokens=3, temperature=0))  # type: ignore[arg-type]
        assert answer == list(engine.submit(prompt, max_tokens=3, temperature=0))


def test_a_loop_that_was_closed_while_it_read_ends_no_other_request(engine: Engine) -> None:
    """Its reader is not told that it has ended, as `asyncio.run` would."""
    loop = asyncio.new_event_loop()
    left = engine.submit(random_ids(20), stop_ids=[]).__aiter__()
    loop.run_until_complete(left.__anext__())
    other = engine.submit(random_ids(5), max_tokens=8, temperature=0)
    loop.close()
    assert list(other)[-1].finish_reason is not None
    assert other.finish_reason != "error"


def test_a_chat_has_the_defaults_of_a_model() -> None:
    """`submit` takes those of Questions, a model those that its signature shows."""
    assert Model.chat.__kwdefaults__ == Questions.of_messages.__kwdefaults__


def test_a_long_prompt_does_not_stop_the_others(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "ROWS_BESIDE", 8)
    told: list[str] = []
    with Engine(talker) as engine:
        short = engine.submit(random_ids(3), temperature=0, max_tokens=60)
        next(iter(short))
        long = engine.submit(random_ids(150, seed=1), temperature=0, max_tokens=1)

        def read(request: Request[GeneratedToken], name: str) -> None:
            for _ in request:
                told.append(name)

        readers = [
            threading.Thread(target=read, args=(short, "short")),
            threading.Thread(target=read, args=(long, "long")),
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(PATIENCE)
    assert told.index("long") >= 10


def test_errors_of_the_device_reach_who_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    error: Exception
    device = engine._work.scheduler._runner.device
    for error in (ArtifactError("a broken device"), RuntimeError("a fault of ours")):
        with monkeypatch.context() as patch:
            patch.setattr(device, "run", fail)
            request = engine.submit(random_ids(5))
            with pytest.raises(type(error), match=str(error)):
                list(request)
            assert request.finish_reason == "error"
        assert list(engine.submit(random_ids(5), max_tokens=2))
    check_books(engine)


def test_wrong_calls_are_refused(engine: Engine, talker: Path) -> None:
    for prompt, options in (
        ([], {}),
        ("text", {}),
        (5, {}),
        (None, {}),
        ([1], {"heat": 1}),
        ([{"role": "nobody", "content": "?"}], {}),
        ([{"role": "user", "content": "?"}], {"reasoning": "deep"}),
    ):
        with pytest.raises(InputError):
            engine.submit(prompt, **options)  # type: ignore[arg-type]
    for sequences in (0, 1000, "2"):
        with pytest.raises(InputError, match="sequences"):
            Engine(talker, sequences=sequences)  # type: ignore[arg-type]


def test_a_forked_process_is_told(talker: Path) -> None:
    with Engine(talker) as engine:
        request = engine.submit([1, 2, 3], max_tokens=4)
        with pytest.warns(DeprecationWarning) if sys.version_info >= (3, 12) else nullcontext():
            child = os.fork()
        if child == 0:
            told = 0
            for work in (lambda: engine.submit([1]), lambda: list(request)):
                try:
                    work()
                except OsscompileError as error:
                    told += "expected the process that made it" in str(error)
            os._exit(told)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert len(list(request)) == 4


def test_a_closed_engine(talker: Path) -> None:
    engine = Engine(talker)
    request = engine.submit(random_ids(10), stop_ids=[])
    next(iter(request))
    engine.close()
    engine.close()
    if request.finish_reason != "stop":
        with pytest.raises(OsscompileError, match="closed"):
            list(request)
    with pytest.raises(OsscompileError, match="closed"):
        engine.submit(random_ids(3))


def test_an_engine_that_nobody_holds_ends_its_thread(talker: Path) -> None:
    engine = Engine(talker)
    thread = engine._thread
    list(engine.submit(random_ids(3), max_tokens=2))
    del engine
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


# --- Under load -------------------------------------------------------------------------------


def check_under_load(artifact: Path, seconds: float, seed: int = 0) -> None:
    """Callers in threads ask, cancel, go on from what was said, and share beginnings, with room for
    one whole context alone; logits of each answer, given what was said, are those of a model
    alone."""
    with Engine(artifact, sequences=16, context=256) as engine:
        fresh, end = load(artifact, context=256), time.monotonic() + seconds
        said: list[tuple[list[int], list[GeneratedToken]]] = []
        sizes: list[int] = []
        lock = threading.Lock()

        def ask(number: int) -> None:
            choice = random.Random(1000 * seed + number)
            history = random_ids(choice.randrange(1, 120), seed=choice.randrange(5))
            while time.monotonic() < end:
                count = choice.randrange(1, 40)
                request = engine.submit(
                    history, max_tokens=count, temperature=1, seed=number, logprobs=0
                )
                tokens = []
                for token in request:
                    tokens.append(token)
                    if choice.random() < 0.02:
                        request.cancel()
                        break
                with lock:
                    said.append((history, tokens))
                ids = [token.token_id for token in tokens]
                history = [*history[: choice.randrange(1, len(history) + 1)], *ids]
                if len(history) > 150 or choice.random() < 0.2:
                    history = random_ids(choice.randrange(1, 120), seed=choice.randrange(5))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(64)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(1.0, seconds / 8))
            sizes.append(process_bytes("VmRSS") or 0)
        for thread in threads:
            thread.join(PATIENCE)
        check_books(engine)
        choice = random.Random(seed)
        for history, tokens in choice.sample(said, min(len(said), 200)):
            check_logprobs(fresh, history, tokens)
        print(f"{len(said)} answers, {sum(len(t) for _, t in said)} tokens")
        middle = len(sizes) // 2
        assert max(sizes[middle:]) < 1.02 * max(sizes[: middle + 1]) + (8 << 20)


def check_logprobs(model: object, history: list[int], tokens: list[GeneratedToken]) -> None:
    if not tokens:
        return
    ids = [*history, *(token.token_id for token in tokens)]
    logits = model.logits(ids[:-1])[len(history) - 1 :].astype(np.float64)  # type: ignore
    logits[:, model._questions.reserved] = -np.inf  # type: ignore[attr-defined]
    top = logits.max(axis=1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    for token, row in zip(tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=2e-4)


def test_under_load(talker: Path) -> None:
    check_under_load(talker, 4.0)


@pytest.mark.long
def test_under_load_for_minutes(talker: Path) -> None:
    check_under_load(talker, float(os.environ.get("OSSCOMPILE_LOAD_SECONDS", "180")), 1)
