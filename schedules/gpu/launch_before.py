"""Wait for the launch before, on targets where a launch may begin before that has ended.

`WAIT` names a function that such a target's source begins with. It returns when the launch before
has ended, at once if it was called before, and lets the next launch begin. Schedules call it after
they have loaded weights; in kernels that do not call it, `passes/wait_for_launches.py` puts it
first.
"""

from tvm import ir
from tvm.ir import Expr
from tvm.script import tirx as T

WAIT = "wait_for_launch_before"


def wait_call() -> Expr:
    return T.call_extern("void", WAIT)


def is_wait(call: Expr) -> bool:
    return call.op == ir.Op.get("tirx.call_extern") and str(call.args[0].value) == WAIT
