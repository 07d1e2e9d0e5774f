"""The pipeline from the unscheduled graph to what the virtual machine executes."""

from collections.abc import Callable
from pathlib import Path

from tvm import ir

from ..targets import Target
from .expand_exp import expand_exp
from .lower_graph import lower_graph
from .pack_weights import pack_weights
from .plan_memory import plan_memory
from .schedule_kernels import schedule_kernels
from .verify import verify

Pass = Callable[[ir.IRModule, Target], ir.IRModule]

PIPELINE: tuple[Pass, ...] = (
    pack_weights,  # first: schedules are written for the target's layout
    schedule_kernels,
    expand_exp,  # after scheduling: the primitives see a call, not twenty operations
    plan_memory,  # after all kernels are final: it fixes who owns which storage
    lower_graph,
)


def run_passes(
    module: ir.IRModule,
    target: Target,
    passes: tuple[Pass, ...] = PIPELINE,
    dump: Path | None = None,
) -> ir.IRModule:
    """Run `passes` in order, checking the IR between them; `dump` gets one file a phase."""
    done: tuple[str, ...] = ()
    verify(module, target, done)
    _dump(module, dump, 0, "imported")
    for number, rewrite in enumerate(passes, start=1):
        module = rewrite(module, target)
        done = (*done, rewrite.__name__)
        verify(module, target, done)
        _dump(module, dump, number, rewrite.__name__)
    return module


def _dump(module: ir.IRModule, folder: Path | None, number: int, phase: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = module.script(show_meta=True)
        (folder / f"{number}_{phase}.py").write_text(text + "\n", encoding="utf-8")
