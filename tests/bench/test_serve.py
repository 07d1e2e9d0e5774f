"""Measure what the server itself takes, with an engine that only sleeps: the CPU's time for an
event of a stream, and the time to the first of them. The clients are another process.

This is not part of the ordinary tests: run `pytest -s tests/bench/test_serve.py`.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import statistics
import time
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

from serving import FINAL, ScriptedEngine, serving_script

TOKENS, CLIENTS = 500, 16
BODY = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


def stream(url: str) -> tuple[float, int]:
    """Seconds to the first text, and how many events came."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    start = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(BODY), headers)
    response, first, count = connection.getresponse(), 0.0, 0
    for line in response:
        if line.startswith(b"data: "):
            count += 1
            first = first or (time.perf_counter() - start if b'"content":"y' in line else 0.0)
    connection.close()
    return first, count


def test_time_to_the_first_token() -> None:
    engine = ScriptedEngine(f"{FINAL}yes<|return|>")
    with serving_script(engine) as url, multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = [first for first, _ in pool.map(stream, [url] * 100)]
    print(f"\nto the first token: {1e3 * statistics.median(seconds):.2f} ms (median of 100)")


def test_processor_time_of_an_event() -> None:
    engine = ScriptedEngine(f"{FINAL}{'yes ' * TOKENS}<|return|>", seconds=0.01)
    with serving_script(engine) as url, multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(stream, (url,))
        start = time.process_time()
        count = pool.apply(streams, (url,))
        seconds = time.process_time() - start
    print(f"\nan event: {1e6 * seconds / count:.0f} us of CPU ({count} events)")


def streams(url: str) -> int:
    """Events of several clients at once."""
    with ThreadPool(CLIENTS) as pool:
        return sum(count for _, count in pool.map(stream, [url] * CLIENTS))
