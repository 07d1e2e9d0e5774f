"""The program in a sandbox: runs cells of Python in one namespace, as a notebook does.

It runs as text that stands alone. Cells come on stdin, a line of JSON each, with a word that nobody
can guess; what they print goes to stdout and stderr, with the value of a cell's last line; then the
word goes to `done`. Whatever a cell does to the streams, the next one finds them whole.
"""

import ast
import contextlib
import fcntl
import json
import linecache
import os
import resource
import sys
import traceback
from typing import Any

CELL = "<cell>"
HIGH = 100  # descriptors that a cell does not come upon


def main(done: int, ready: str, limits: dict[str, int], user: int | None) -> None:
    """ready: the first word. limits: resources of the module `resource`, by name. user: who this
    becomes, from root."""
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    os.chdir(os.environ["HOME"])
    for name, most in limits.items():
        with contextlib.suppress(ValueError):  # a lower limit stands, or the system knows none
            resource.setrlimit(getattr(resource, name), (most, most))
    done, cells = _moved(done), os.fdopen(_moved(0), "rb")
    streams = _Streams()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    process = os.getpid()
    os.write(done, ready.encode())
    for line in cells:
        word, code = json.loads(line)
        streams.mend()
        run_cell(code, namespace, streams)
        if os.getpid() != process:  # a cell forked, and this is the child
            os._exit(0)
        os.write(done, word.encode())


class _Streams:
    """stdin, which is empty, stdout and stderr."""

    def __init__(self) -> None:
        self._empty, self._told = _moved(os.open(os.devnull, os.O_RDONLY)), _moved(1)
        self._named = {"stdin": sys.stdin, "stdout": sys.stdout, "stderr": sys.stderr}
        self.mend()

    def mend(self) -> None:
        """Make them what they were before a cell closed or replaced them."""
        for number, (name, stream) in enumerate(self._named.items()):
            os.dup2(self._told if number else self._empty, number)
            if stream.closed:
                mode = "w" if number else "r"
                self._named[name] = open(number, mode, 1, encoding="utf-8", closefd=False)
            setattr(sys, name, self._named[name])


def _moved(descriptor: int) -> int:
    """The same under a high number, which programs that a cell runs do not get."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH)
    os.close(descriptor)
    return moved


def run_cell(code: str, namespace: dict[str, Any], streams: _Streams) -> None:
    linecache.cache[CELL] = (len(code), None, code.splitlines(keepends=True), CELL)
    try:
        tree = ast.parse(code, CELL)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, CELL, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), CELL, "eval"), namespace)
            if value is not None:
                print(repr(value))
    except BaseException as error:  # whatever ends a cell, exit() too, the next one may come
        streams.mend()
        below = error.__traceback__.tb_next if error.__traceback__ is not None else None
        traceback.print_exception(type(error), error, below)
    streams.mend()
    sys.stdout.flush()
    sys.stderr.flush()


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:]))
