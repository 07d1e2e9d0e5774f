"""Python of a model's in a process of its own: what it can, and what it cannot."""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from osscompile.runtime import InputError, OsscompileError, PythonSandbox
from osscompile.runtime.tools.system_calls import memory_filter

PATIENCE_SECONDS = 20.0


@pytest.fixture(params=["bubblewrap", "unsafe"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[PythonSandbox]:
    with open_sandbox(unsafe=request.param == "unsafe") as sandbox:
        yield sandbox


@pytest.fixture
def safe() -> Iterator[PythonSandbox]:
    with open_sandbox() as sandbox:
        yield sandbox


def open_sandbox(
    *, seconds: float = 60.0, output: int = 10_000, unsafe: bool = False
) -> PythonSandbox:
    try:
        return PythonSandbox(seconds=seconds, output=output, unsafe=unsafe, memory=500_000_000)
    except OsscompileError as error:
        if unsafe or not has_no_bubblewrap(error):
            raise
        pytest.skip(str(error))


def has_no_bubblewrap(error: OsscompileError) -> bool:
    """Whether it is not installed, or not allowed to make namespaces."""
    return shutil.which("bwrap") is None or "bwrap: " in str(error)


def wait_until_gone(pid: int) -> None:
    limit = time.monotonic() + PATIENCE_SECONDS
    while is_running(pid):
        assert time.monotonic() < limit, f"process {pid} still runs"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


# What it can


def test_output_values_and_variables_are_those_of_a_notebook(sandbox: PythonSandbox) -> None:
    assert sandbox("x = 6\nprint('six')\nx * 7") == "six\n42"
    assert sandbox("x") == "6"
    assert sandbox("y = 1") == "[no output]"
    assert sandbox("import os; os.write(1, b'raw')\nNone") == "raw"
    assert sandbox("import sys; print('warned', file=sys.stderr)") == "warned"
    assert sandbox("def f():\n    return 1\n\nf()\n'last'\n") == "'last'"
    assert sandbox("input()").endswith("EOFError: EOF when reading a line")
    assert sandbox("") == "[no output]"


def test_errors_are_told_as_python_tells_them(sandbox: PythonSandbox) -> None:
    told = sandbox("x = 1\nx / 0")
    assert told.startswith('Traceback (most recent call last):\n  File "<cell>", line 2')
    assert "x / 0" in told and told.endswith("ZeroDivisionError: division by zero")
    assert "SyntaxError" in sandbox("x = = 1")
    assert "SystemExit" in sandbox("exit(3)")
    assert sandbox("x") == "1"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; sys.stdout = None; sys.stderr = None", "[no output]"),
        ("import sys; print('x'); sys.stdout.close(); sys.stderr.close()", "x"),
        ("import sys; sys.stdout = sys.stderr = open('a.txt', 'w')", "[no output]"),
        ("import sys; sys.stdout = sys.stderr = None; 1 / 0", "division by zero"),
        ("import sys; del sys.stdout, sys.stderr, sys.stdin", "[no output]"),
        ("import os; os.closerange(0, 50)", "[no output]"),
        (
            "import os\nfor i in 3, 4, 5:\n    try: os.write(i, b'.' * 99)\n    except OSError: 0",
            "",
        ),
    ],
)
def test_a_cell_does_not_spoil_the_streams_of_the_next(
    sandbox: PythonSandbox, code: str, told: str
) -> None:
    assert sandbox("kept = 1") == "[no output]"
    assert sandbox(code).endswith(told)
    assert sandbox("print('printed')\n6 * 7") == "printed\n42"
    assert sandbox("1 / 0").endswith("ZeroDivisionError: division by zero")
    assert sandbox("import sys; print('warned', file=sys.stderr)\nkept") == "warned\n1"
    assert sandbox("input()").endswith("EOFError: EOF when reading a line")


def test_a_cell_that_says_that_it_is_done(sandbox: PythonSandbox) -> None:
    """Whatever it writes wherever it can, the next output is the next cell's."""
    sandbox("import os, threading")
    said = sandbox(
        "print('first')\nfor i in range(3, 200):\n    try: os.write(i, b'.' * 999)\n"
        "    except OSError: pass\nprint('last')"
    )
    assert said.endswith("first\nlast")
    assert sandbox("'second'") == "'second'" and sandbox("'third'") == "'third'"


def test_interpreter_that_loses_its_way_is_started_again(sandbox: PythonSandbox) -> None:
    assert "the interpreter ended" in sandbox("import os; os.closerange(0, 200)")
    assert sandbox("1") == "1"


def test_code_is_text(sandbox: PythonSandbox) -> None:
    for code in (5, None, b"1"):
        with pytest.raises(InputError, match="code: expected text, found"):
            sandbox(code)  # type: ignore[arg-type]
    assert "Error" in sandbox("'\ud800'\0")
    assert sandbox("1") == "1"


def test_long_code_and_long_output(sandbox: PythonSandbox) -> None:
    text = "x" * 300_000
    assert sandbox(f"len('{text}')") == "300000"
    told = sandbox("print('y' * 5_000_000)")
    assert told.startswith("y" * 10_000 + "\n[cut: the first 10000 of ")
    assert sandbox("1") == "1"


def test_nothing_of_an_output_is_left_for_the_next(
    sandbox: PythonSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read byte by byte, most of it is still in the pipe when the cell is done."""
    monkeypatch.setattr("osscompile.runtime.tools.process.PART", 1)
    assert sandbox("print('y' * 9000)") == "y" * 9000
    assert sandbox("1") == "1"


def test_files_stay_in_the_scratch_folder_until_it_is_closed(sandbox: PythonSandbox) -> None:
    assert sandbox("open('a.txt', 'w').write('kept')") == "4"
    assert (sandbox.folder / "a.txt").read_text() == "kept"
    assert (
        sandbox("import tempfile; print(open('a.txt').read(), tempfile.mkstemp()[0] > 0)")
        == "kept True"
    )
    sandbox.close()
    assert not sandbox.folder.exists()
    with pytest.raises(OsscompileError, match="found it closed"):
        sandbox("1")


def test_model_is_told_what_holds_here(sandbox: PythonSandbox) -> None:
    assert "time out after 60.0 seconds" in sandbox.description
    drive = sandbox("import os; print(os.getcwd())")
    assert f"The drive at '{drive}' can be used" in sandbox.description


def test_packages_beside_the_interpreter_can_be_imported(sandbox: PythonSandbox) -> None:
    assert sandbox("import numpy; int(numpy.arange(4).sum())") == "6"


# Its limits


@pytest.mark.parametrize("unsafe", [False, True])
def test_code_that_outlives_its_time_ends_with_its_descendants(unsafe: bool) -> None:
    with open_sandbox(seconds=3.0, unsafe=unsafe) as sandbox:
        code = (
            "import subprocess, sys, time\n"
            "sleep = [sys.executable, '-c', 'import time; open(\"b\", \"w\"); time.sleep(1000)']\n"
            "subprocess.Popen([*sleep, 'descendant'])\n"
            "print('started', flush=True)\n"
            "while True: pass"
        )
        told = sandbox(code)
        assert told.startswith("started\n[stopped after 3 seconds; the next call begins anew")
        limit = time.monotonic() + PATIENCE_SECONDS
        while descendants := processes_in(sandbox.folder):
            assert time.monotonic() < limit, descendants
            time.sleep(0.02)
        assert sandbox("1 + 1") == "2"
        assert "NameError" in sandbox("sleep")


def processes_in(folder: Path) -> list[str]:
    """Processes whose working folder this is."""
    if not Path("/proc/self/cwd").exists():
        pytest.skip("this system does not list processes in /proc")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.path.samefile(process / "cwd", folder):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_interpreter_that_ends_is_started_again(sandbox: PythonSandbox) -> None:
    assert sandbox("x = 1\nimport os\nos._exit(5)").startswith("[the interpreter ended; the next")
    assert "NameError" in sandbox("x")


def test_child_of_a_fork_does_not_go_on_as_the_interpreter(sandbox: PythonSandbox) -> None:
    assert sandbox("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)") == "[no output]"
    assert sandbox("pid > 0") == "True"


def test_memory_is_limited(sandbox: PythonSandbox) -> None:
    if sys.platform == "darwin":
        pytest.skip("this system does not limit it")
    assert sandbox("x = bytearray(10**9)").endswith("MemoryError")
    assert sandbox("1") == "1"


def test_memory_that_no_limit_counts_is_not_given(safe: PythonSandbox) -> None:
    if memory_filter() is None:
        pytest.skip("the numbers of this machine's system calls are not known")
    assert "Function not implemented" in safe("import os; os.memfd_create('x')")
    code = "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
    assert safe(f"{code}c.shmget(0, 4096, 0o1600), ctypes.get_errno()") == "(-1, 38)"
    for folder in ("/dev/shm", "/tmp", "/run", "/dev"):
        assert "Error" in safe(f"open('{folder}/x', 'w')")
    assert (
        safe(
            "import subprocess, sys\nrun = [sys.executable, '-c', 'print(1)']\n"
            "subprocess.run(run, capture_output=True, text=True).stdout"
        )
        == "'1\\n'"
    )


def test_interrupt_ends_what_runs(sandbox: PythonSandbox) -> None:
    timer = threading.Timer(1.0, os.kill, (os.getpid(), 2))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        sandbox("import time; x = 1; time.sleep(1000)")
    assert "NameError" in sandbox("x")


def test_sandbox_outlives_the_thread_that_opened_it() -> None:
    opened: list[PythonSandbox] = []
    sandbox = open_sandbox()
    sandbox.close()
    thread = threading.Thread(target=lambda: opened.append(open_sandbox()))
    thread.start()
    thread.join()
    with opened[0] as sandbox:
        sandbox("x = 5")
        time.sleep(0.2)
        assert sandbox("x") == "5"


# What bubblewrap keeps it from


def test_it_has_no_network(safe: PythonSandbox) -> None:
    told = safe("import socket\ns = socket.socket()\ns.settimeout(5)\ns.connect(('192.0.2.1', 80))")
    assert "Network is unreachable" in told
    assert safe("[name for _, name in socket.if_nameindex()]") == "['lo']"


def test_it_reads_nothing_of_the_user(safe: PythonSandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    tmp_path.chmod(0o755)
    assert "FileNotFoundError" in safe(f"open({str(secret)!r})")
    assert "FileNotFoundError" in safe("open('/etc/passwd')")
    assert "FileNotFoundError" in safe(f"import os; os.listdir({str(Path(__file__).parent)!r})")
    names = safe("sorted(os.environ)")
    assert "PYTHON" not in names and "USER" not in names


def test_it_writes_only_into_the_scratch_folder(safe: PythonSandbox) -> None:
    prefix = Path(sys.prefix)
    for folder in ("/", "/usr", "/dev", "/mnt", str(prefix)):
        told = safe(f"open({folder + '/osscompile-x'!r}, 'w')")
        assert "Read-only file system" in told or "Permission denied" in told, (folder, told)
    code = "import os\n[name for name in ('/', '/usr', '/dev') if not os.statvfs(name).f_flag & 1]"
    assert safe(code) == "[]"


def test_it_sees_no_other_processes_and_kills_none(safe: PythonSandbox) -> None:
    told = safe(f"import os, signal\nos.kill({os.getpid()}, 0)")
    assert "ProcessLookupError" in told


def test_it_is_no_root_and_cannot_become_it(safe: PythonSandbox) -> None:
    if os.geteuid() != 0:
        pytest.skip("who is not root has nothing to give up")
    assert safe("import os\nos.getresuid(), os.getgroups()") == "((65534, 65534, 65534), [])"
    assert "PermissionError" in safe("os.setuid(0)") and "PermissionError" in safe(
        "os.chroot('/usr')"
    )


def test_processes_are_limited() -> None:
    with open_sandbox(seconds=30.0) as sandbox:
        told = sandbox(
            "import os, time\n"
            "for i in range(200):\n"
            "    if os.fork() == 0:\n"
            "        time.sleep(1000)\n"
        )
        assert "BlockingIOError" in told


def test_without_bubblewrap_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OsscompileError, match=r"expected bubblewrap .*unsafe=True"):
        PythonSandbox()


def test_bubblewrap_that_may_not_make_namespaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "bwrap"
    stub.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    stub.chmod(0o755)
    tmp_path.chmod(0o755)
    for folder in (tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OsscompileError, match="No permissions to create new namespace; allow"):
        PythonSandbox()


@pytest.mark.parametrize("name", ["seconds", "memory", "output", "processes"])
@pytest.mark.parametrize("value", [0, -1, "5", True, math.nan, math.inf, 10**30, 1e-9])
def test_bad_limits(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        PythonSandbox(**{name: value})  # type: ignore[arg-type]
