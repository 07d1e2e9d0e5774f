"""Servers in this process, for tests: of a model, or of an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from talker import TOKENIZER

from osscompile.runtime import Finish, InputError, Piece, Usage
from osscompile.runtime.generated import GeneratedToken, PieceMaker
from osscompile.runtime.sampling_options import SamplingOptions
from osscompile.runtime.serve.answers import Desk
from osscompile.runtime.serve.app import make_app
from osscompile.runtime.serve.connections import Server
from osscompile.runtime.serve.gate import Gate
from osscompile.runtime.serve.metrics import Metrics
from osscompile.runtime.serve.server import listen
from osscompile.runtime.serve.service import Service
from osscompile.runtime.tokenizer import Tokenizer

PATIENCE = 60.0  # seconds, after which a test has hung
FINAL = "<|channel|>final<|message|>"
HELLO = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"


@contextmanager
def serving(app: Any, most: int | None = None) -> Iterator[str]:
    """The address of a server that runs in a thread, with so many connections at once."""
    address = listen("127.0.0.1", 0)
    server = Server(app, most)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[address.socket])), daemon=True
    )
    thread.start()
    try:
        yield address.url
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def ask(
    url: str,
    path: str = CHAT,
    body: object = HELLO,
    method: str = "POST",
    **headers: str,
) -> tuple[int, Any, http.client.HTTPResponse]:
    """Status, JSON or text, and what else of the answer there is."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, {"Content-Type": "application/json"} | names)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(content) if is_json and content else content, response


def begin_stream(url: str, **options: Any) -> socket.socket:
    """A connection that has read the head of a stream."""
    body = json.dumps(HELLO | {"stream": True} | options).encode()
    connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), PATIENCE)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


class ScriptedEngine:
    """Says harmony text to every question, a token at a time, `seconds` apart."""

    def __init__(self, said: str = f"{FINAL}Yes.<|return|>", seconds: float = 0.0) -> None:
        self.tokenizer, self.seconds = Tokenizer(TOKENIZER), seconds
        self.told = [*pieces_of(self.tokenizer, said)]
        self.error: Exception | None = None  # raised in place of the last piece
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.requests: list[ScriptedRequest] = []

    def submit(self, prompt: Any, **options: Any) -> ScriptedRequest:
        if isinstance(prompt, Sequence) and any("refuse" in str(m) for m in prompt):
            raise InputError("messages[0].content: expected another, found this")
        self.asked.append((prompt, options))
        request = ScriptedRequest(self)
        self.requests.append(request)
        return request


class ScriptedRequest:
    def __init__(self, engine: ScriptedEngine) -> None:
        self.usage, self.finish_reason = Usage(7, 3), None
        self._engine, self.cancelled = engine, False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Piece]:
        told = self._engine.told
        for pieces, usage in told:
            await asyncio.sleep(self._engine.seconds)
            if self.cancelled:
                self.finish_reason = "cancelled"
                return
            if pieces is told[-1][0] and self._engine.error is not None:
                raise self._engine.error
            self.usage = usage
            for piece in pieces:
                if isinstance(piece, Finish):
                    self.usage, self.finish_reason = piece.usage, piece.reason
                yield piece


def pieces_of(tokenizer: Tokenizer, said: str) -> Iterator[tuple[list[Piece], Usage]]:
    """What each token tells, and what all took then."""
    maker = PieceMaker(tokenizer, SamplingOptions(), [])
    for count, id in enumerate(harmony_ids(tokenizer, said), 1):
        usage = Usage(7, 3, count)
        yield maker.push(GeneratedToken(id, usage=usage)), usage


def harmony_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    parts = re.split(r"(<\|\w+\|>)", text)
    return [
        id
        for part in parts
        for id in (
            [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
        )
    ]


def scripted_service(engine: ScriptedEngine, running: int = 4, waiting: int = 100) -> Service:
    metrics = Metrics(lambda: 0, lambda: 0)
    desk = Desk(engine, Gate(running, waiting), metrics)
    return Service("scripted", "osc_test", engine.tokenizer, desk)


@contextmanager
def serving_script(engine: ScriptedEngine, **options: Any) -> Iterator[str]:
    """`options`: of `make_app`, and running and waiting, and the most connections."""
    room = {name: options.pop(name) for name in ("running", "waiting") if name in options}
    most = options.pop("most", None)
    with serving(make_app(scripted_service(engine, **room), **options), most) as url:
        yield url
