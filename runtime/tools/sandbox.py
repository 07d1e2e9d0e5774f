"""Python that a model writes, run in a process of its own that can do little harm."""

import os
import shutil
import sys
import tempfile
import threading
import weakref
from pathlib import Path

from ..errors import InputError, OsscompileError
from ..harmony.builtin_tools import python_description
from .process import Interpreter
from .system_calls import memory_filter

DRIVE = "/mnt/data"  # where the models were trained to keep files
NOBODY = 65534  # whom root's sandboxes run as: the processes of root are not limited
SECONDS_TO_START = 60.0
MB = 1_000_000
# What the system can be told of.
MOST_SECONDS, MOST_BYTES, MOST_PROCESSES = 1_000_000, 1 << 60, 1 << 20


class PythonSandbox:
    """Runs code for the builtin tool `python`, as a notebook: a call finds the variables of those
    before, and its output is what it printed and the value of its last line.

    The code runs under bubblewrap (`bwrap`), in namespaces of its own. It has no network, sees no
    other processes, reads /usr and the folders of this interpreter alone, and writes only into a
    scratch folder: /mnt/data there, `folder` here, which is deleted in the end. A call takes
    `seconds` at most, or else all processes are killed, and the next call begins anew, as it does
    when the interpreter has ended. `output`: bytes of it that are kept. `memory`: bytes that each
    process may use, and each file in the scratch folder; `processes`: how many there are at once,
    so that all may use so many times the memory. On x86-64 and AArch64 none gets memory that is no
    process's (memfd_create, shmget).

    It does not protect from faults of the kernel, from code that reads what lies in /usr or beside
    the interpreter (its installed packages), from many large files in the scratch folder, or from a
    use of all cores. A link in `folder` may lead anywhere: do not follow one. Variables are seen by
    every call, so take one sandbox for one conversation.

    unsafe: runs the code without bubblewrap, as you: it can read and send away all that you can,
    delete your files, and leave processes behind that changed their group; the number of processes
    is not limited. Only for code that you would run yourself.

    Use it in a `with` statement, or call `close`. Raises OsscompileError where bubblewrap is not
    installed, or may not make namespaces.
    """

    def __init__(
        self,
        *,
        seconds: float = 120.0,
        memory: int = 2000 * MB,
        output: int = 100_000,
        processes: int = 64,
        unsafe: bool = False,
    ) -> None:
        for name, value, least, most in (
            ("seconds", seconds, 0.001, MOST_SECONDS),
            ("memory", memory, 1, MOST_BYTES),
            ("output", output, 1, MOST_BYTES),
            ("processes", processes, 1, MOST_PROCESSES),
        ):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise InputError(
                    f"{name}: expected a number from {least} to {most}, found {value!r:.100}"
                )
        self._seconds, self._output, self._unsafe = seconds, int(output), unsafe
        self._limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": int(memory), "RLIMIT_AS": int(memory)}
        if not unsafe:  # else those of the whole user would count
            self._limits["RLIMIT_NPROC"] = int(processes)
        scratch = tempfile.TemporaryDirectory(prefix="osscompile-", ignore_cleanup_errors=True)
        self.folder = Path(scratch.name)
        self.description = python_description(seconds, str(self.folder) if unsafe else DRIVE)
        self._user = NOBODY if os.geteuid() == 0 and not unsafe else None
        if self._user is not None:
            os.chown(self.folder, self._user, self._user)
        self._lock = threading.Lock()
        self._running: list[Interpreter] = []  # one, or none
        self._close = weakref.finalize(self, _close, self._running, scratch)
        try:
            self._start()
        except BaseException:  # an interrupt too: nothing is left behind
            self._close()
            raise

    def __call__(self, code: str) -> str:
        """The output of code, with a note if it is cut or the interpreter ended. Raises InputError
        for what is no text."""
        if not isinstance(code, str):
            raise InputError(f"code: expected text, found {type(code).__name__}")
        with self._lock:
            if not self._close.alive:
                raise OsscompileError("PythonSandbox: expected one that is open, found it closed")
            interpreter = self._running[0] if self._running else self._start()
            text, ended = "", "interrupted"
            try:
                text, ended = interpreter.run(code, self._seconds, self._output)
            finally:  # of an interrupt too: what the code still does, nobody waits for
                if ended:
                    self._running.clear()
                    interpreter.kill()
        notes = [text] if text else []
        if ended:
            notes.append(f"[{ended}; the next call begins anew, without variables]")
        return "\n".join(notes) or "[no output]"

    def close(self) -> None:
        """End all that runs, and delete the scratch folder."""
        with self._lock:
            self._close()

    def __enter__(self) -> "PythonSandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Interpreter:
        home = str(self.folder) if self._unsafe else DRIVE
        filter = None if self._unsafe else _open_filter()
        inherited = [] if filter is None else [filter]
        try:
            command = [sys.executable] if self._unsafe else _bubblewrap(self.folder, filter)
            interpreter = Interpreter(
                command, self.folder, home, self._limits, self._user, inherited
            )
        finally:
            for descriptor in inherited:
                os.close(descriptor)
        said, ended = interpreter.start(SECONDS_TO_START)
        if ended:
            interpreter.kill()
            raise OsscompileError(
                f"PythonSandbox: expected an interpreter that starts in bubblewrap, found: "
                f"{said.strip() or ended:.500}; allow namespaces "
                "here, or pass unsafe=True and read what that means"
            )
        self._running.append(interpreter)
        return interpreter


def _close(running: list[Interpreter], scratch: tempfile.TemporaryDirectory[str]) -> None:
    for interpreter in running:
        interpreter.kill()
    scratch.cleanup()


def _open_filter() -> int | None:
    """A pipe that has the filter of system calls, or None for a machine that has none."""
    program = memory_filter()
    if program is None:
        return None
    reader, writer = os.pipe()
    os.write(writer, program)
    os.close(writer)
    return reader


def _bubblewrap(folder: Path, filter: int | None) -> list[str]:
    """The command that runs this interpreter inside."""
    program = shutil.which("bwrap")
    if program is None:
        raise OsscompileError(
            "PythonSandbox: expected bubblewrap (`bwrap`), found none; install it (on Debian and "
            "Ubuntu: apt install bubblewrap), or pass unsafe=True and read what that means"
        )
    command = [program, "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # it needs no namespace of users, in which it could not become another
        command += [f"--unshare-{kind}" for kind in ("ipc", "pid", "net", "uts", "cgroup-try")]
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-all"]
    if filter is not None:
        command += ["--seccomp", str(filter)]
    command += ["--ro-bind", "/usr", "/usr"]
    for link in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):  # folders of older systems
        if os.path.islink(link):
            command += ["--symlink", os.readlink(link), link]
        elif os.path.exists(link):
            command += ["--ro-bind", link, link]
    command += ["--dir", "/etc"]
    for file in ("/etc/ld.so.cache", "/etc/alternatives"):
        command += ["--ro-bind-try", file, file]
    for prefix in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix, sys.prefix)):
        if not Path(prefix).is_relative_to("/usr"):
            command += [*_folders_above(prefix), "--ro-bind", prefix, prefix]
    command += ["--dev", "/dev", "--remount-ro", "/dev"]
    command += [*_folders_above(DRIVE), "--bind", str(folder), DRIVE, "--remount-ro", "/"]
    return [*command, "--", sys.executable]


def _folders_above(path: str) -> list[str]:
    """What makes the folders above a path; by itself bubblewrap would make them for root alone."""
    return [word for folder in [*Path(path).parents][-2::-1] for word in ("--dir", str(folder))]
