"""Ask for room: a processor shall have registers for several work-groups of a kernel at once.

A compiler takes as many registers for a thread as one work-group may have, unless it knows better.
`ROOM` names a function of an int32, how many work-groups, that does nothing; whoever makes a
target's source may read the number out of its call.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

ROOM = "make_room_for"
ROOMS = (1, 2, 3, 4, 6, 8)  # work-groups
MOST = 32  # subgroups: 64 registers are left for a thread of a processor with 65,536
WANTED = 24


def room_call(groups: int) -> Expr:
    return T.call_extern("void", ROOM, T.int32(groups))


def rooms(subgroups: int) -> tuple[list[int], int]:
    """Return for how many work-groups of so many subgroups there may be room, and should be."""
    fitting = [n for n in ROOMS if n * subgroups <= MOST] or [1]
    return fitting, max((n for n in fitting if n * subgroups <= WANTED), default=1)
