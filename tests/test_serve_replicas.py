"""Two replicas of nano behind one server, of which Ray takes care."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from serving import PATIENCE, serving, wait_until

from osscompile.runtime import InputError, load
from osscompile.runtime.serve.app import make_app
from osscompile.runtime.serve.service import make_service

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs the extra `ray`", allow_module_level=True)
with warnings.catch_warnings(action="ignore"):  # its own use of pydantic
    from osscompile.runtime.serve.replicas import ReplicaRequest, Replicas, ray

OPTIONS = {"sequences": 8, "context": 1024, "threads": 1}


@pytest.fixture(scope="module", autouse=True)
def signals() -> Iterator[None]:
    """Ray leaves a handler of its own, which other files' tests would meet."""
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


def test_more_replicas_than_there_is_room_for(nano_artifact: Path) -> None:
    with pytest.raises(InputError, match=r"at most .* CPU of the Ray cluster, found 9999"):
        Replicas(nano_artifact, 9999, OPTIONS)


@pytest.fixture(scope="module")
def replicas(nano_artifact: Path) -> Iterator[Replicas]:
    with Replicas(nano_artifact, 2, OPTIONS) as replicas:
        yield replicas


def test_who_has_not_its_token_cannot_reach_the_cluster(replicas: Replicas) -> None:
    """Which listens on every address of the machine."""
    address = ray.get_runtime_context().gcs_address
    code = f"import ray; ray.init({address!r})"
    others = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64, "RAY_NUM_REDIS_GET_RETRIES": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=others, capture_output=True)
    assert result.returncode != 0 and b"ConnectionError" in result.stderr


@pytest.fixture(scope="module")
def url(replicas: Replicas) -> Iterator[str]:
    with serving(make_app(make_service(replicas, "nano", 100))) as url:
        yield url


def ask(url: str, question: str, **options: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    body = {"model": "nano", "messages": [{"role": "user", "content": question}], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | options), headers)
    return connection.getresponse()


def processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "Replica:osscompile" in name(p)]


def name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_conversation_stays_with_its_replica(url: str) -> None:
    cached = [
        json.load(ask(url, f"What is {i} + 25?"))["usage"]["prompt_tokens_details"]["cached_tokens"]
        for i in (3, 3, 4, 4)
    ]
    assert min(cached[1::2]) > 80


def test_wrong_requests_are_refused_before_a_replica_is_asked(replicas: Replicas) -> None:
    with pytest.raises(InputError):
        replicas.submit([{"role": "nobody", "content": "?"}])


def test_what_a_replica_refuses_says_no_more_than_an_engine_does(replicas: Replicas) -> None:
    """Ray's own error has the way to it, file by file."""

    async def answer() -> None:
        options = {"temperature": -1.0}  # which `submit` would not let through
        async for _ in ReplicaRequest(replicas, [0], [1], options):
            pass

    with pytest.raises(InputError) as caught:
        asyncio.run(answer())
    assert str(caught.value).startswith("temperature: expected") and "/" not in str(caught.value)


def test_a_client_that_goes_away_ends_its_answer(replicas: Replicas, url: str) -> None:
    stream = ask(url, "What is 2 + 2?", stream=True, stop=["never"], seed=1)
    stream.readline()
    stream.close()
    wait_until(lambda: replicas.num_running == 0)


def test_a_replica_that_is_killed_loses_no_request_but_its_streams(
    nano_artifact: Path, url: str
) -> None:
    """Those end with an error that says so; whole answers come from the other one."""
    ended: list[str] = []
    told = {"whole": 0, "streams": 0}
    over, telling = threading.Event(), set[int]()
    # Their reasoning never ends, so that some are told by either replica at any time. Without a
    # header, the first tokens would be held back.
    special = load(nano_artifact).tokenizer.special
    unsaid = ("<|end|>", "<|start|>", "<|return|>", "<|call|>")
    endless = {
        "stream": True,
        "max_completion_tokens": 600,
        "logit_bias": {str(special[name]): -100 for name in unsaid},
    }

    def client(number: int) -> None:
        count = number
        while not over.is_set():
            count += 16
            a, b = count % 50, number
            streams = number % 2 == 0
            response = ask(url, f"What is {a} + {b}?", **(endless if streams else {}))
            text = ""
            for line in response:
                text += line.decode()
                if streams and b'"reasoning":"' in line:
                    telling.add(number)
            telling.discard(number)
            assert response.status == 200, text
            if not streams:
                assert f"= {a + b}" in json.loads(text)["choices"][0]["message"]["content"]
                told["whole"] += 1
            elif "[DONE]" in text:
                told["streams"] += 1
            else:
                *_, last = (line for line in text.splitlines() if line)
                ended.append(json.loads(last[6:])["error"]["code"])

    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            client(number)
        except BaseException as error:  # told to the test below
            errors.append(error)

    clients = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in clients:
        thread.start()
    wait_until(lambda: bool(errors) or (told["whole"] > 5 and len(telling) == 8))
    killed = processes()[0]
    killed.kill()
    before = dict(told)
    wait_until(lambda: bool(errors) or min(told[kind] - before[kind] for kind in told) > 20)
    over.set()
    for thread in clients:
        thread.join(PATIENCE)
    assert not errors
    assert 0 < len(ended) <= 8 and set(ended) == {"replica_ended"}
    wait_until(lambda: len(processes()) == 2)  # Ray has started another
    assert killed.pid not in {process.pid for process in processes()}
