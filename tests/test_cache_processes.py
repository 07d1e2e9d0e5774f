"""Two processes that `run` the same model at once, and one that is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cached import cache as cache  # fixtures

from osscompile.cache.entries import list_entries, stale_entries

COMPILE_SLOWLY = """
import sys, time, types
from pathlib import Path
module = types.ModuleType("osscompile.compiler")  # the real one imports TVM

def compile(model, target, output, **options):
    print("compiling", flush=True)
    while not Path("go").exists():
        time.sleep(0.01)
    output.mkdir()
    (output / "manifest.json").write_text("{}")

module.compile = compile
sys.modules[module.__name__] = module
from osscompile.cache.compile_once import compile_once
print(compile_once("nano"), flush=True)
"""


@pytest.fixture
def start(cache: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start processes that compile until there is a file `go`."""
    processes = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMPILE_SLOWLY]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def line(stream: Any) -> str:
    return str(stream.readline())


def test_the_second_process_waits_for_the_first(start: Callable[[], Any], cache: Path) -> None:
    first = start()
    assert line(first.stdout) == "compiling\n"
    (entry,) = list_entries()
    assert stale_entries([entry]) == []
    second = start()
    assert line(second.stderr) == f"another process compiles {entry.name}: waiting for it\n"
    Path("go").touch()
    artifact = f"{entry.artifact}\n"
    assert line(first.stdout) == artifact and line(second.stdout) == artifact
    assert (first.wait(), second.wait()) == (0, 0)
    assert os.listdir(cache) == [entry.name]


def test_a_killed_process_keeps_nobody_waiting(start: Callable[[], Any], cache: Path) -> None:
    first = start()
    assert line(first.stdout) == "compiling\n"
    second = start()
    assert "waiting" in line(second.stderr)
    first.send_signal(signal.SIGKILL)
    assert line(second.stdout) == "compiling\n"
    second.send_signal(signal.SIGKILL)
    second.wait()
    (entry,) = list_entries()
    assert stale_entries([entry]) == [entry] and not entry.is_whole()
    Path("go").touch()
    assert line(start().stdout) == "compiling\n"
