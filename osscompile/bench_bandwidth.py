"""How fast the machine reads memory: no decode step can be faster than its bytes take."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import tvm
from tvm import ir
from tvm.script import tirx as T

from . import targets
from .bench_machine import best_seconds
from .runtime.device import aligned_empty, tensor
from .runtime.machine import physical_cores
from .schedules.cpu.prefetch import LINE_BYTES, fetch

READ_BYTES = 1 << 30  # from memory, far beyond what a cache holds of it
PREFETCH_BYTES = (1024, 2048, 4096, 8192)  # the best counts: a limit is what is possible
STREAMS = 4  # that a core reads side by side
LANES = LINE_BYTES // 4


def read_bandwidth() -> float:
    """Bytes a second that all cores together read from memory.

    The largest of what numpy's sum reaches and, where a target of ours runs here, of loops that
    fetch ahead by several distances.
    """
    cores = physical_cores()
    lines = READ_BYTES // cores // STREAMS // LINE_BYTES
    parts = [aligned_empty((STREAMS, lines, LANES), np.dtype(np.uint32)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:  # where a page lies is up to who writes it first
        list(pool.map(lambda part: part.fill(1), parts))
    best = best_seconds(np.add.reduce, [(part.reshape(-1).view(np.uint64),) for part in parts])
    with suppress(targets.TargetError):
        target = tvm.target.Target(targets.of_this_machine().tvm)
        tensors = [
            (tensor(part), tensor(aligned_empty((LANES,), np.dtype(np.uint32)))) for part in parts
        ]
        for distance in PREFETCH_BYTES:
            function = tvm.compile(_module(distance, lines), target)["main"]
            best = min(best, best_seconds(function, tensors))
    return cores * parts[0].nbytes / best


def _module(distance: int, lines: int) -> ir.IRModule:
    """data [STREAMS, lines, LANES] uint32 -> its sums by lane."""
    ahead, dtype = distance // LINE_BYTES, f"uint32x{LANES}"

    @T.prim_func(s_tir=True)
    def main(
        data: T.Buffer((STREAMS, lines, LANES), "uint32"), out: T.Buffer((LANES,), "uint32")
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        sums = T.alloc_buffer((STREAMS, LANES), "uint32", scope="local")
        for s in T.unroll(STREAMS):
            sums[s, 0:LANES] = T.broadcast(T.uint32(0), LANES)
        for i in range(lines):
            for s in T.unroll(STREAMS):
                T.evaluate(fetch(data[s, i + ahead, 0]))
                sums[s, 0:LANES] = sums.vload([s, 0], dtype) + data.vload([s, i, 0], dtype)
        out[0:LANES] = T.broadcast(T.uint32(0), LANES)
        for s in T.unroll(STREAMS):
            out[0:LANES] = out.vload([0], dtype) + sums.vload([s, 0], dtype)

    return ir.IRModule({"main": main})
