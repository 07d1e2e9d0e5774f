"""`osscompile serve`, as people start, ask and end it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from serving import PATIENCE, wait_until
from talker import TOKENIZER

from osscompile.cli import main
from osscompile.runtime.tokenizer import Tokenizer

SUM = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}


@contextmanager
def server(
    *arguments: object, descriptors: int | None = None, **environment: str
) -> Iterator[tuple[Any, str, list[str]]]:
    """Process, address and what it says on stderr, line by line. descriptors: that it may have."""
    limits = None if descriptors is None else (descriptors, descriptors)
    process = subprocess.Popen(
        [sys.executable, "-m", "osscompile", "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        preexec_fn=limits and partial(resource.setrlimit, resource.RLIMIT_NOFILE, limits),
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+:\d+", process.stdout.readline())
        assert found, said
        yield process, found[0], said
    finally:
        process.kill()
        process.wait()
        reader.join(PATIENCE)


def post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urlopen(request, timeout=PATIENCE)


def test_sigterm_finishes_what_runs(nano_artifact: Path) -> None:
    with server(nano_artifact, "--name", "n") as (process, url, said):
        stream = post(url, SUM | {"model": "n", "stream": True})
        stream.readline()
        process.send_signal(signal.SIGTERM)
        chunks = [json.loads(line[6:]) for line in stream if line.startswith(b"data: {")]
        content = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        assert content == "17 + 25 = 42."
        assert process.wait(PATIENCE) == 0
    assert not said


def test_what_takes_too_long_to_end_is_told_so(nano_artifact: Path) -> None:
    special = Tokenizer(TOKENIZER).special
    ends = [special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>")]
    endless = {"max_tokens": 4000, "logit_bias": {str(id): -100 for id in ends}}
    with server(nano_artifact, "--name", "n", "--end-within", "0.2") as (process, url, said):
        stream = post(url, SUM | endless | {"model": "n", "stream": True})
        stream.readline()
        process.send_signal(signal.SIGTERM)
        *_, last = (line for line in stream if line.strip())
        assert process.wait(PATIENCE) == 0
    assert b"ending" in last and not said


def test_more_connections_than_descriptors(nano_artifact: Path) -> None:
    with server(nano_artifact, descriptors=120) as (process, url, said), ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(200):
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
        with urlopen(f"{url}/health", timeout=PATIENCE) as answer:
            assert answer.status == 200
        with post(url, SUM | {"model": "nano"}) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert not said


def test_a_second_server_on_the_port_says_so(nano_artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-m", "osscompile", "serve", nano_artifact, "--port", port],
            capture_output=True,
            text=True,
        )
    assert result.returncode == 1 and f"127.0.0.1:{port}: expected" in result.stderr
    assert "another server" in result.stderr and "Traceback" not in result.stderr


def test_an_address_that_others_reach_is_told(nano_artifact: Path) -> None:
    with server(nano_artifact, "--host", "0.0.0.0", OSSCOMPILE_API_KEY="k") as (_, _url, said):
        wait_until(lambda: bool(said))
    assert "other machines" in said[0] and "has the key" in said[0]
    with server(nano_artifact, "--host", "0.0.0.0") as (_, _url, said):
        wait_until(lambda: bool(said))
    assert "anybody" in said[0]


@pytest.mark.parametrize(
    ("arguments", "key", "told"),
    [
        (["--port", "99999"], "", "argument --port: expected 0 to 65535"),
        (["--port", "-1"], "", "argument --port: expected 0 to 65535"),
        (["--end-within", "-1"], "", "argument --end-within: expected seconds"),
        (["--end-within", "nan"], "", "argument --end-within: expected seconds"),
        ([], "k\xe9y", "$OSSCOMPILE_API_KEY: expected"),
        ([], "k\udce9y", "$OSSCOMPILE_API_KEY: expected"),  # no UTF-8
        ([], "a key", "$OSSCOMPILE_API_KEY: expected"),
        ([], "\n", "$OSSCOMPILE_API_KEY: expected"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(
    nano_artifact: Path,
    arguments: list[str],
    key: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OSSCOMPILE_API_KEY", key)
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["serve", str(nano_artifact), *arguments]))
    assert ended.value.code in (1, 2)
    assert told in capsys.readouterr().err


def test_a_key_from_a_file_and_a_host_that_others_name(nano_artifact: Path) -> None:
    with server(nano_artifact, OSSCOMPILE_API_KEY="key\n") as (_, url, _):
        for host, status in (("localhost", 200), ("evil.example", 421)):
            headers = {"Authorization": "Bearer key", "Host": host}
            try:
                found = urlopen(Request(f"{url}/v1/models", headers=headers)).status
            except HTTPError as error:
                found = error.code
            assert found == status


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(nano_artifact: Path) -> None:
    with server(nano_artifact) as (process, url, _):
        body = json.dumps(SUM | {"model": "nano"})
        command = ["curl", "-sS", f"{url}/v1/chat/completions", "--json", body]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    answer = json.loads(result.stdout)
    assert answer["choices"][0]["message"]["content"] == "17 + 25 = 42."


def test_without_the_extra_it_says_what_to_install(nano_artifact: Path) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from osscompile.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "serve", nano_artifact], capture_output=True, text=True
    )
    assert result.returncode == 1 and "osscompile[serve]" in result.stderr, result.stderr
