"""Show TVM's parser who called it, without reading the source of every caller.

For each kernel and each macro the parser walks up the stack. Python's `inspect` finds the module
and the lines of every frame there, which takes a fifth to a third of a compile. The parser looks at
the line of one of them only: whether it defines a kernel in a class.
"""

import inspect
import sys
from types import FrameType, SimpleNamespace

import tvm.script.parser.core.parser
import tvm.tirx.script.parser.entry

DEFINES = 2  # which frame up from the decorator has the line that is looked at


def show_callers_without_source() -> None:
    """Replace the module `inspect` for TVM's parser; everyone else's stays as it is."""
    names = {name: getattr(inspect, name) for name in dir(inspect)}
    seen = SimpleNamespace(**names | {"stack": _stack, "getouterframes": _outer_frames})
    tvm.script.parser.core.parser.inspect = seen
    tvm.tirx.script.parser.entry.inspect = seen


def _stack() -> list[inspect.FrameInfo]:
    frames = _outer_frames(sys._getframe(1))
    if len(frames) > DEFINES:
        frame = frames[DEFINES].frame
        frames[DEFINES] = inspect.FrameInfo(frame, *inspect.getframeinfo(frame))
    return frames


def _outer_frames(frame: FrameType | None) -> list[inspect.FrameInfo]:
    frames = []
    while frame is not None:
        code = frame.f_code
        frames.append(
            inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None)
        )
        frame = frame.f_back
    return frames
