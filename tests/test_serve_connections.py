"""Connections that nothing comes from, or that nothing is taken from, and many of them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from serving import (
    CHAT,
    PATIENCE,
    ScriptedEngine,
    ask,
    begin_stream,
    serving_script,
    wait_until,
)

from osscompile.runtime.serve import access, connections

HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
LARGE = 12_000_000  # bytes, more than the kernel keeps for a connection


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_script(ScriptedEngine(), api_key="k") as url:
        yield url


def connect(url: str) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    """Until the server ends it."""
    told = b""
    try:
        while part := connection.recv(1 << 16):
            told += part
    except ConnectionResetError:
        pass
    return told


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HEAD, HEAD + b"Content-Length: 5\r\n"])
def test_headers_that_do_not_come(url: str, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    with connect(url) as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""


def test_nothing_after_an_answer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a part of the next request came."""
    monkeypatch.setattr(connections, "KEEP_ALIVE", 0.1)
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /")
        assert read_all(connection).endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("length", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come(length: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(connections, "REST_SECONDS", 0.1)
    with serving_script(ScriptedEngine()) as url, connect(url) as connection:
        connection.sendall(HEAD + length + b"\r\n\r\n1\r\n{")
        told = read_all(connection)
    assert told.startswith(b"HTTP/1.1 408") and b"invalid_request_error" in told


def test_a_body_whose_answer_was_told_is_not_read_to_its_end(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REST_SECONDS", 0.1)
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: 9999999999\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 401"
        with pytest.raises(ConnectionError):
            for _ in range(1 << 20):
                connection.sendall(b"x" * 4096)


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_is_not_taken(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells the instructions again, more of them than the kernel holds."""
    ended, end = threading.Event(), connections.Connection.end
    monkeypatch.setattr(connections, "TAKE_SECONDS", 0.1)
    monkeypatch.setattr(connections.Connection, "end", lambda self: (end(self), ended.set()))
    engine = ScriptedEngine(seconds=0.01)
    with serving_script(engine, max_body_bytes=2 * LARGE) as url, connect(url) as connection:
        asked = {"model": "scripted", "input": "Hello", "stream": streams}
        body = json.dumps(asked | {"instructions": "x" * LARGE}).encode()
        head = HEAD.replace(CHAT.encode(), b"/v1/responses")
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert ended.wait(PATIENCE)
        assert 0 < len(read_all(connection)) < len(body)
        wait_until(lambda: engine.requests[0].cancelled)


def test_a_large_answer_that_is_taken_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TAKE_SECONDS", 0.2)
    monkeypatch.setattr(connections, "KEEP_ALIVE", 0.2)
    options = {"max_body_bytes": 2 * LARGE}
    with serving_script(ScriptedEngine(), **options) as url, connect(url) as connection:
        body = json.dumps({"model": "scripted", "input": "", "instructions": "x" * LARGE})
        head = HEAD.replace(CHAT.encode(), b"/v1/responses")
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body.encode())
        told = 0
        while part := connection.recv(1 << 20):
            told += len(part)
            time.sleep(0.03)
    assert told > len(body)


@pytest.mark.parametrize(
    "header",
    [b"A: " + b"a" * 1_000_000, b"".join(b"A%d: a\r\n" % i for i in range(100_000))],
    ids=["one", "many"],
)
def test_headers_have_a_limit_that_holds_before_the_key_is_read(url: str, header: bytes) -> None:
    with connect(url) as connection:
        try:
            connection.sendall(HEAD + header)
        except ConnectionError:
            pass  # it was told before all had been sent
        told = read_all(connection)
    assert not told or (told.startswith(b"HTTP/1.1 400") and b"at most 16 kB" in told)


def test_idle_connections_make_room() -> None:
    with serving_script(ScriptedEngine(), most=8) as url, ExitStack() as stack:
        idle = [stack.enter_context(connect(url)) for _ in range(40)]
        assert ask(url, "/health", None, "GET")[0] == 200
        assert all(read_all(connection) == b"" for connection in idle[:32])


def test_where_all_are_asked_a_new_connection_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEEP_ALIVE", 0.1)
    engine = ScriptedEngine(seconds=0.02)
    with serving_script(engine, most=3) as url:
        streams = [begin_stream(url) for _ in range(3)]
        assert ask(url)[0] == 200
        assert all(b"[DONE]" in read_all(stream) for stream in streams)
