"""The pipeline from the unscheduled graph to the IR that the virtual machine executes."""

from collections.abc import Callable
from pathlib import Path

from tvm import ir

from ..errors import CompileError
from ..schedules.records import Records
from ..targets import Target
from .expand_exp import expand_exp
from .join_attention import join_attention
from .join_experts import join_experts
from .lower_graph import lower_graph
from .multiply_bfloat16 import multiply_bfloat16
from .name_rounding import name_rounding
from .pack_weights import pack_weights
from .plan_memory import plan_memory
from .schedule_kernels import schedule_kernels
from .split_launches import split_launches
from .store_halves import store_halves
from .verify import verify
from .wait_for_launches import wait_for_launches

Pass = Callable[[ir.IRModule, Target], ir.IRModule]

# These run once for all variants of a target, which read the same weights. They run first, because
# schedules are written for the target's layout.
SHARED_PASSES: tuple[Pass, ...] = (
    pack_weights,
    multiply_bfloat16,  # after packing, which knows the kernels of the graph only
)
# These run for each variant.
VARIANT_PASSES: tuple[Pass, ...] = (
    schedule_kernels,
    expand_exp,  # after scheduling, whose primitives then see a call, not twenty operations
    name_rounding,  # after scheduling: TVM does not know the function it calls
    plan_memory,  # after all kernels are final: it assigns the storages
    lower_graph,
)
# These run for each variant of a target that the runtime drives launch by launch.
LAUNCH_PASSES: tuple[Pass, ...] = (
    join_attention,  # before scheduling: a schedule takes the joined kernel whole
    join_experts,
    schedule_kernels,
    expand_exp,
    name_rounding,
    plan_memory,
    store_halves,  # after scheduling, so that rules see the graph's types
    split_launches,  # no other pass can read the kernels that it leaves
    wait_for_launches,
)


def run_passes(
    module: ir.IRModule,
    target: Target,
    passes: tuple[Pass, ...],
    dump: Path | None = None,
    after: tuple[Pass, ...] = (),
    records: Records | None = None,
) -> ir.IRModule:
    """Run `passes` in order and check the IR between them; `dump` gets one file a phase.

    `after` names the passes that the module went through before. `records` has the constants of
    schedules; by default they are the committed ones.
    """
    done = tuple(rewrite.__name__ for rewrite in after)
    if not done:
        verify(module, target, done)
        _dump(module, dump, 0, "imported")
    for rewrite in passes:
        if rewrite is schedule_kernels:
            module = schedule_kernels(module, target, records)
        else:
            module = rewrite(module, target)
        done = (*done, rewrite.__name__)
        verify(module, target, done)
        _dump(module, dump, len(done), rewrite.__name__)
    return module


def _dump(module: ir.IRModule, folder: Path | None, number: int, phase: str) -> None:
    if folder is not None:
        text = module.script(show_meta=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}_{phase}.py").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise CompileError(
                f"dump: expected a folder that can be written, found: {error}; choose another"
            ) from error
