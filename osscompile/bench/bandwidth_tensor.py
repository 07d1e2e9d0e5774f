"""How fast a device of TVM's runtime reads its own memory.

The kernel is built here, with the compiler, as for a CPU: that runtime compiles a kernel's source
from within a library only, and what a library looks like inside is TVM's own affair.
"""

import tempfile
from pathlib import Path

import numpy as np
from tvm import ir
from tvm.script import tirx as T

from .. import targets
from ..codegen.library import build_library
from ..runtime.bench.bandwidth_device import CHUNKS, READ_BYTES, STEPS, THREADS, TOGETHER, TRIALS
from ..runtime.devices.tvm_memory import TensorMemory
from ..runtime.devices.tvm_runtime import load_function

READS = 8  # of a sample: what it takes to wait for the device is once in it
LANES = 4  # 32-bit numbers of a load
GROUP_BYTES = THREADS * STEPS * LANES * 4  # that a group reads from end to end


class TensorReader:
    """Reads `num_bytes` a call with all of the device, and does nothing else with them.

    `memory`: the device's, `target` and `variant`: of an artifact that runs there. Raises
    OsscompileError without room, TargetError if there is no such target.
    """

    def __init__(self, memory: TensorMemory, target: str, variant: str) -> None:
        self.num_bytes = READ_BYTES
        self._memory = memory
        groups = READ_BYTES // GROUP_BYTES
        built_for = next(t for t in targets.load_variants(target) if t.variant == variant)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, built_for.library)
            build_library(read_module(groups), built_for, library)
            self._read = load_function(library, "read", threads=1)  # of the host, which waits
        data = memory.empty((groups, STEPS, THREADS, LANES), "uint32")
        rows = memory.view(data, (CHUNKS, READ_BYTES // CHUNKS // 4), "uint32")
        rng = np.random.default_rng(0)  # zeros would take less power, perhaps less time
        chunk = rng.integers(0, 1 << 32, READ_BYTES // CHUNKS // 4, dtype=np.uint32)
        memory.write(rows, np.broadcast_to(chunk, (CHUNKS, chunk.size)))
        self._tensors = [data, memory.empty((groups, THREADS), "uint32")]
        self.best_seconds = min(self.seconds() for _ in range(TRIALS))

    def seconds(self) -> float:
        """What a call takes by the host's clock; see `TensorMemory.seconds`."""
        return self._memory.seconds(self._read, [self._tensors] * READS)


def read_module(groups: int) -> ir.IRModule:
    """`read`: data [groups, STEPS, THREADS, LANES] uint32 -> sums [groups, THREADS] uint32."""
    dtype = f"uint32x{LANES}"

    @T.prim_func(s_tir=True)
    def read(
        data: T.Buffer((groups, STEPS, THREADS, LANES), "uint32"),
        sums: T.Buffer((groups, THREADS), "uint32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for group in T.thread_binding(groups, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                total = T.alloc_buffer((LANES,), "uint32", scope="local")
                total[0:LANES] = T.broadcast(T.uint32(0), LANES)
                for step in range(STEPS // TOGETHER):
                    for i in T.unroll(TOGETHER):
                        total[0:LANES] = total.vload([0], dtype) + data.vload(
                            [group, step * TOGETHER + i, thread, 0], dtype
                        )
                sums[group, thread] = total[0] + total[1] + total[2] + total[3]

    return ir.IRModule({"read": read})
