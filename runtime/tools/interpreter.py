"""The program in a sandbox: runs cells of Python in one namespace, as a notebook does.

It runs as text that stands alone. Cells come on stdin, a line of JSON each; what they print goes to
stdout and stderr, with the value of a cell's last line; then a byte goes to `done`.
"""

import ast
import contextlib
import json
import linecache
import os
import resource
import sys
import traceback
from typing import Any

CELL = "<cell>"


def main(done: int, limits: dict[str, int], user: int | None) -> None:
    """limits: resources of the module `resource`, by name. user: who this becomes, from root."""
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    os.chdir(os.environ["HOME"])
    for name, most in limits.items():
        with contextlib.suppress(ValueError):  # a lower limit stands, or the system knows none
            resource.setrlimit(getattr(resource, name), (most, most))
    os.set_inheritable(done, False)
    cells = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a cell reads is empty
    namespace: dict[str, Any] = {"__name__": "__main__"}
    process = os.getpid()
    os.write(done, b".")
    for line in cells:
        run_cell(json.loads(line), namespace)
        if os.getpid() != process:  # a cell forked, and this is the child
            os._exit(0)
        os.write(done, b".")


def run_cell(code: str, namespace: dict[str, Any]) -> None:
    linecache.cache[CELL] = (len(code), None, code.splitlines(keepends=True), CELL)
    try:
        tree = ast.parse(code, CELL)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, CELL, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), CELL, "eval"), namespace)
            if value is not None:
                print(repr(value))
        sys.stdout.flush()
    except BaseException as error:  # whatever ends a cell, exit() too, the next one may come
        below = error.__traceback__.tb_next if error.__traceback__ is not None else None
        traceback.print_exception(type(error), error, below)


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:]))
