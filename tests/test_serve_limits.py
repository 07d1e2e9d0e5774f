"""What a server refuses, and how it stays fair and whole: keys, full queues, clients
that go away."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from serving import (
    CHAT,
    HELLO,
    PATIENCE,
    ScriptedEngine,
    ask,
    begin_stream,
    scripted_service,
    serving,
    serving_script,
    wait_until,
)
from test_engine import check_books

from osscompile.runtime import Engine
from osscompile.runtime.bench.machine import process_bytes
from osscompile.runtime.serve.app import make_app
from osscompile.runtime.serve.gate import Gate
from osscompile.runtime.serve.service import make_service


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_script(ScriptedEngine()) as url:
        yield url


def test_other_paths_and_methods(url: str) -> None:
    for status, method, path in (
        (404, "GET", "/v1/nothing"),
        (404, "POST", "/v1/embeddings"),
        (405, "GET", CHAT),
        (405, "DELETE", "/health"),
        (400, "POST", "/v1/responses"),
    ):
        found, answer, _ = ask(url, path, None, method)
        assert (found, answer["error"]["type"]) == (status, "invalid_request_error")


def test_a_page_elsewhere_cannot_ask_without_leave(url: str) -> None:
    """A form of another page may be sent without asking first, but not as JSON."""
    found, answer, response = ask(
        url, Origin="https://elsewhere.example", Content_Type="text/plain"
    )
    assert found == 400 and "application/json" in answer["error"]["message"]
    assert response.headers["access-control-allow-origin"] is None


def test_pages_that_may_ask_are_named() -> None:
    app = {"allowed_origins": ["https://friend.example/"], "api_key": "k"}
    with serving_script(ScriptedEngine(), **app) as url:
        for origin, allowed in (
            ("https://friend.example", "https://friend.example"),
            ("https://elsewhere.example", None),
        ):
            asks = {"Access_Control_Request_Method": "POST", "Origin": origin}
            _, _, preflight = ask(url, body=None, method="OPTIONS", **asks)
            assert preflight.headers["access-control-allow-origin"] == allowed
        _, _, refused = ask(url, Origin="https://friend.example")
        assert refused.status == 401  # a page may read why
        assert refused.headers["access-control-allow-origin"] == "https://friend.example"
        assert refused.headers["access-control-expose-headers"] == "Retry-After"


def test_an_api_key() -> None:
    with serving_script(ScriptedEngine(), api_key="secret") as url:
        for status, headers in (
            (401, {}),
            (401, {"Authorization": "Bearer Secret"}),
            (401, {"Authorization": "secret"}),
            (401, {"Authorization": "Bearer s\xe9cret"}),
            (200, {"Authorization": "Bearer secret"}),
            (200, {"Authorization": "bearer  secret"}),
        ):
            found, answer, _ = ask(url, **headers)
            assert found == status
            if status == 401:
                assert answer["error"]["code"] == "invalid_api_key"
        for path, status in (("/", 200), ("/health", 200), ("/metrics", 401), ("/v1/models", 401)):
            assert ask(url, path, None, "GET")[0] == status


def test_the_description_holds_the_models_name_and_needs_the_key() -> None:
    with serving_script(ScriptedEngine(), api_key="secret") as url:
        assert ask(url, "/openapi.json", None, "GET")[0] == 401


def test_names_of_this_machine(url: str) -> None:
    """A page elsewhere may have its name lead here."""
    with serving_script(ScriptedEngine(), allowed_hosts=["Box.lan"]) as url:
        for host in (
            "localhost",
            "localhost:80",
            "LOCALHOST",
            "127.0.0.1:8000",
            "[::1]:1",
            "box.lan",
        ):
            assert ask(url, Host=host)[0] == 200, host
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.a"):
            status, answer, _ = ask(url, Host=host, Origin=f"http://{host}")
            assert status == 421 and "--allow-host" in answer["error"]["message"]
            assert ask(url, "/", None, "GET", Host=host)[0] == 421


def test_no_path_leads_to_the_host_that_a_client_names(url: str) -> None:
    status, _, response = ask(url, f"{CHAT}/", Host="evil.example")
    assert status == 404 and "location" not in response.headers


def test_what_can_be_got_has_a_head(url: str) -> None:
    for path in ("/", "/health", "/metrics", "/v1/models"):
        status, content, response = ask(url, path, None, "HEAD")
        assert (status, content) == (200, "") and response.headers["content-type"]


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = ScriptedEngine(seconds=0.02)
    with serving_script(engine, running=1, waiting=2) as url:
        streams = [begin_stream(url, n=n) for n in (1, 2)]
        status, answer, response = ask(url)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert ask(url, body=HELLO | {"n": 4})[0] == 400  # which never fits
        for stream in streams:
            stream.close()
        wait_until(lambda: all(request.cancelled for request in engine.requests))
        assert ask(url)[0] == 200


def test_a_client_that_goes_away_ends_its_answer() -> None:
    engine = ScriptedEngine(seconds=0.05)
    with serving_script(engine) as url:
        begin_stream(url).close()
        wait_until(lambda: engine.requests[0].cancelled)
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
        connection.request("POST", CHAT, json.dumps(HELLO), {"Content-Type": "application/json"})
        wait_until(lambda: len(engine.requests) == 2)
        connection.close()
        wait_until(lambda: engine.requests[1].cancelled)
        metrics = ask(url, "/metrics", None, "GET")[1]
    assert 'status="499"' in metrics


def test_the_gate_drains() -> None:
    async def drain() -> tuple[bool, bool]:
        gate = Gate(1, 1)
        gate.enter(1)
        in_time = await gate.drain(0.01)
        asyncio.get_running_loop().call_later(0.01, gate.leave, 1, 0.1)
        return in_time, await gate.drain(PATIENCE)

    assert asyncio.run(drain()) == (False, True)


def test_a_server_that_ends_lets_nobody_in() -> None:
    service = scripted_service(ScriptedEngine())
    service.desk.gate.ending = True
    with serving(make_app(service)) as url:
        for path, body, method in ((CHAT, HELLO, "POST"), ("/health", None, "GET")):
            status, _, response = ask(url, path, body, method)
            assert status == 503 and int(response.headers["retry-after"]) > 0
        assert ask(url, "/v1/models", None, "GET")[0] == 200


def test_a_fault_of_ours_is_counted_told_to_pages_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = ScriptedEngine()
    engine.error = RuntimeError("a fault")
    with serving_script(engine, allowed_origins=["https://a.example"]) as url:
        status, _, response = ask(url, Origin="https://a.example")
        metrics = ask(url, "/metrics", None, "GET")[1]
    assert status == 500
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    assert f'path="{CHAT}",status="500"' in metrics and 'status="499"' not in metrics
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


def test_a_body_too_large_is_counted_by_its_path() -> None:
    with serving_script(ScriptedEngine(), max_body_bytes=10) as url:
        assert ask(url)[0] == 413
        assert f'path="{CHAT}",status="413"' in ask(url, "/metrics", None, "GET")[1]


def test_metrics(url: str) -> None:
    ask(url)
    text = ask(url, "/metrics", None, "GET")[1]
    values = {
        name: float(value)
        for line in text.splitlines()
        if not line.startswith("#")
        for name, value in [line.rsplit(" ", 1)]
    }
    assert values[f'osscompile_requests_total{{path="{CHAT}",status="200"}}'] >= 1
    assert values["osscompile_prompt_tokens_total"] % 7 == 0
    assert values["osscompile_cached_tokens_total"] % 3 == 0
    assert values["osscompile_completion_tokens_total"] > 0
    assert values["osscompile_time_to_first_token_seconds_count"] >= 1
    assert {"osscompile_answers_running", "osscompile_answers_waiting"} <= values.keys()


# With a model


@pytest.fixture(scope="module")
def engine(nano_artifact: Path) -> Iterator[Engine]:
    with Engine(nano_artifact, sequences=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def nano(engine: Engine) -> Iterator[str]:
    with serving(make_app(make_service(engine, "scripted", 100))) as url:
        yield url


def test_pages_of_a_client_that_goes_away_are_free(engine: Engine, nano: str) -> None:
    bias = {"logit_bias": {str(id): -100 for id in stop_ids(engine)}, "max_tokens": 3000}
    streams = [begin_stream(nano, **bias, n=2) for _ in range(3)]
    wait_until(lambda: engine.num_running == 6)
    for stream in streams:
        stream.close()
    check_books(engine)


def stop_ids(engine: Engine) -> list[int]:
    assert engine.tokenizer is not None
    return [engine.tokenizer.special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>")]


def test_64_clients_at_once(engine: Engine, nano: str) -> None:
    """Each asks and streams; answers of one size end in the order in which they were asked for, but
    for those that run together."""
    order: list[int] = []
    wrong: list[object] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        question = f"What is {number} + 9?"
        body = HELLO | {"messages": [{"role": "user", "content": question}], "temperature": 0}
        status, answer, _ = ask(nano, body=body)
        content = answer["choices"][0]["message"]["content"] if status == 200 else answer
        with lock:
            order.append(number)
            if content != f"{number} + 9 = {number + 9}.":
                wrong.append(content)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
        time.sleep(0.002)  # so that they are asked in this order
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong and sorted(order) == [*range(64)]
    late = [place - number for place, number in enumerate(order)]
    assert max(map(abs, late)) <= 4 * engine.sequences, order


@pytest.mark.long
def test_64_clients_for_minutes(engine: Engine, nano: str) -> None:
    """Some go away; nobody sees an error or a wrong answer, and memory stays as it is."""
    end = time.monotonic() + float(os.environ.get("OSSCOMPILE_LOAD_SECONDS", "180"))
    wrong: list[object] = []
    sizes: list[int] = []
    asked = [0] * 64

    def client(number: int) -> None:
        choice = random.Random(number)
        while time.monotonic() < end:
            a, b = choice.randrange(50), choice.randrange(50)
            question = {"role": "user", "content": f"What is {a} + {b}?"}
            body = {"messages": [question], "temperature": 0, "reasoning_effort": "low"}
            if choice.random() < 0.1:
                begin_stream(nano, **body).close()
                continue
            status, answer, _ = ask(nano, body=HELLO | body)
            content = answer["choices"][0]["message"]["content"] if status == 200 else answer
            asked[number] += 1
            if f"= {a + b}" not in content:
                wrong.append((status, content))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1.0)
        sizes.append(process_bytes("VmRSS") or 0)
    middle = len(sizes) // 2
    print(f"{sum(asked)} answers, {min(asked)} to {max(asked)} a client, {len(wrong)} wrong")
    print(f"{sizes[middle] >> 20} MiB after half of the time, {sizes[-1] >> 20} at the end")
    assert all(status == 200 for status, _ in wrong) and len(wrong) < 0.05 * sum(asked)
    assert min(asked) > 0.5 * max(asked)
    assert max(sizes[middle:]) < 1.02 * max(sizes[: middle + 1]) + (8 << 20)
    check_books(engine)
