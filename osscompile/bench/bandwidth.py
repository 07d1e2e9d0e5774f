"""How fast the machine reads memory: no decode step can be faster than its bytes take.

Neighbours on a shared machine change that from second to second, so `Reader` is meant to be called
by turns with what is compared with it, on the same threads.
"""

import time
from typing import Any

import numpy as np
import tvm
from tvm import ir
from tvm.script import tirx as T

from .. import targets
from ..runtime.devices.tvm_cpu import aligned_empty, tensor
from ..schedules.cpu.prefetch import LINE_BYTES, fetch

READ_BYTES = 1 << 30  # from memory, far beyond what a cache holds of it
PIECE_BYTES = 1 << 20  # that a core reads from end to end
PREFETCH_BYTES = (1024, 2048, 4096, 8192)
TRIALS = 3  # of each distance; the best counts: a limit is what is possible
LANES = LINE_BYTES // 4
SUMS = 4  # that hide each other's latency


class Reader:
    """Reads `num_bytes` a call, on the threads that compiled functions run on, and does nothing
    else with them; it fetches ahead as far as is best here. Raises TargetError where no target of
    ours runs."""

    def __init__(self) -> None:
        target = tvm.target.Target(targets.of_this_machine().tvm)
        self.num_bytes = READ_BYTES
        arrays = [aligned_empty(shape, np.dtype(np.uint32)) for shape in shapes()]
        self._tensors = [tensor(array) for array in arrays]
        pieces, lines, _ = arrays[0].shape
        loops: list[tuple[float, Any]] = []
        for distance in PREFETCH_BYTES:
            module = tvm.compile(read_module(distance, pieces, lines), target)
            if not loops:  # where a page lies is up to who writes it first
                module["fill"](self._tensors[0])
            self._read = module["read"]
            loops.append((min(self.seconds() for _ in range(TRIALS)), self._read))
        self.best_seconds, self._read = min(loops, key=lambda loop: loop[0])

    def seconds(self) -> float:
        start = time.perf_counter()
        self._read(*self._tensors)
        return time.perf_counter() - start


def shapes() -> tuple[tuple[int, int, int], tuple[int, int]]:
    """The shape of the data, and that of their sums."""
    pieces = READ_BYTES // PIECE_BYTES
    return (pieces, PIECE_BYTES // LINE_BYTES, LANES), (pieces, LANES)


def read_module(distance: int, pieces: int, lines: int) -> ir.IRModule:
    """`fill`: ones to data [pieces, lines, LANES] uint32. `read`: data -> sums [pieces, LANES]."""
    ahead, dtype = distance // LINE_BYTES, f"uint32x{LANES}"

    @T.prim_func(s_tir=True)
    def fill(data: T.Buffer((pieces, lines, LANES), "uint32")) -> None:
        T.func_attr({"tirx.noalias": True})
        for piece in T.parallel(pieces):
            for i in range(lines):
                data[piece, i, 0:LANES] = T.broadcast(T.uint32(1), LANES)

    @T.prim_func(s_tir=True)
    def read(
        data: T.Buffer((pieces, lines, LANES), "uint32"), out: T.Buffer((pieces, LANES), "uint32")
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for piece in T.parallel(pieces):
            sums = T.alloc_buffer((SUMS, LANES), "uint32")
            for s in T.unroll(SUMS):
                sums[s, 0:LANES] = T.broadcast(T.uint32(0), LANES)
            for i in range(lines // SUMS):
                for s in T.unroll(SUMS):
                    T.evaluate(fetch(data[piece, i * SUMS + s + ahead, 0]))
                    sums[s, 0:LANES] = sums.vload([s, 0], dtype) + data.vload(
                        [piece, i * SUMS + s, 0], dtype
                    )
            out[piece, 0:LANES] = T.broadcast(T.uint32(0), LANES)
            for s in T.unroll(SUMS):
                out[piece, 0:LANES] = out.vload([piece, 0], dtype) + sums.vload([s, 0], dtype)

    return ir.IRModule({"fill": fill, "read": read})
