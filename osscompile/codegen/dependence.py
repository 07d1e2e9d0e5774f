"""Find the launches that may begin before the one before them has ended."""

import dataclasses
from collections.abc import Mapping, Sequence

from tvm import ir, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc
from tvm_ffi import structural_walk

from ..runtime.devices.program import MEMORY, Launch, bounds
from ..schedules.gpu.launch_before import is_wait

Places = set[tuple[str, int]]


def mark_dependent(
    launches: Sequence[Launch], module: ir.IRModule, symbols: Mapping[str, int] | None = None
) -> list[Launch]:
    """Mark every launch as dependent whose kernel waits itself for the launch before, and reads
    nothing before it waits that the launch before writes. `symbols`: the most that each stands for.

    What an earlier launch wrote is there then: the one before waited for it before it let this one
    begin. One that may have no groups may not be the one before: then that is an earlier one. The
    first launch is not marked: what is before it, in another call, may be no kernel.
    """
    uses = {kernel: _Uses(module[kernel]) for kernel in {launch.kernel for launch in launches}}
    marked: list[Launch] = []
    late: Places = set()  # what launches write that may be the one before
    for launch in launches:
        use = uses[launch.kernel]
        dependent = use.waits and not late & _places(launch, use.read_early)
        marked.append(dataclasses.replace(launch, dependent=dependent and bool(marked)))
        written = _places(launch, use.written)
        always = all(bounds(count, symbols or {})[0] > 0 for count in launch.groups)
        late = written if always else late | written
    return marked


class _Uses:
    """What a device function does with its parameters, by their numbers."""

    def __init__(self, kernel: PrimFunc) -> None:
        self.waits = False
        self.read_early: set[int] = set()  # before it waits
        self.written: set[int] = set()
        self._numbers = {parameter: i for i, parameter in enumerate(kernel.params)}
        self._parameter_of: dict[Expr, int] = {}  # by buffer
        callbacks = [
            (tirx.DeclBuffer, self._declare),
            (ir.TensorLoad, self._load),
            (tirx.BufferStore, self._store),
            (ir.Call, self._call),
        ]
        structural_walk(kernel.body, callbacks, order="pre")  # as it is executed

    def _declare(self, declared: tirx.DeclBuffer) -> None:
        if declared.data in self._numbers:
            self._parameter_of[declared.buffer] = self._numbers[declared.data]

    def _load(self, load: ir.TensorLoad) -> None:
        if not self.waits:
            self._add(self.read_early, load.source)

    def _store(self, store: tirx.BufferStore) -> None:
        self._add(self.written, store.buffer)

    def _call(self, call: ir.Call) -> None:
        self.waits = self.waits or is_wait(call)
        # Who has an address may write there; that it may read there `_load` sees, in the argument.
        if call.op == ir.Op.get("tirx.address_of"):
            self._add(self.written, call.args[0].source)

    def _add(self, numbers: set[int], buffer: Expr) -> None:
        if buffer in self._parameter_of:
            numbers.add(self._parameter_of[buffer])


def _places(launch: Launch, numbers: set[int]) -> Places:
    arguments = (launch.arguments[i] for i in numbers)
    return {(kind, number) for kind, number in arguments if kind in MEMORY}
