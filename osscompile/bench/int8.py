"""Int8 arithmetic: what the machine can do."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import ir
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from .. import targets
from ..runtime.machine import physical_cores
from ..schedules.cpu import dpbusd, maddubs

STEPS = 1 << 22  # of every chain in one run: some 30 ms
REPEATS = 5  # the best of them counts: a limit is what was possible


@dataclass(frozen=True)
class _Loop:
    """One step of a sum that waits only for itself: (weights, sum) -> the next sum.

    `chains`: of such sums, enough to hide how long a step takes, few enough for 16 registers.
    `vectors`: that a step multiplies.
    """

    chains: int
    vectors: int
    step: Callable[[Buffer, Expr], Expr]


def int8_peak() -> float | None:
    """Multiply-adds of bytes a second that all cores together can do, with nothing to load.

    The instructions are those that our MXFP4 kernels multiply with: `dpbusd` in whole registers, or
    with `maddubs` per 256 multiply-adds 8 products of 32 bytes whose pairs are summed in int16, 6
    sums of those, 2 widened to int32 and 2 added up. The look-ups and scales that a kernel needs
    beside them are not in it. None for a machine that has another instruction, or none.
    """
    try:
        target = targets.of_this_machine()
    except targets.TargetError:
        return None
    loop = LOOPS.get(target.int8_dot or "")
    if loop is None:
        return None
    lanes = target.register_bits // 32
    function = tvm.compile(_module(loop, lanes), target=tvm.target.Target(target.tvm))["main"]
    weights = np.arange(loop.vectors * lanes * 4, dtype=np.uint8).reshape(loop.vectors, -1) % 25
    parts = [
        (tvm.runtime.tensor(weights), tvm.runtime.tensor(np.empty(loop.chains * lanes, np.int32)))
        for _ in range(physical_cores())
    ]
    seconds = _best_seconds(function, parts)
    return len(parts) * STEPS * loop.chains * loop.vectors * lanes * 4 / seconds


def _best_seconds(work: Callable[..., object], parts: Sequence[tuple[Any, ...]]) -> float:
    """What `work(*part)` takes on all parts at once, a thread each; it must let go of Python's
    lock."""
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(lambda part: work(*part), parts))
            best = min(best, time.perf_counter() - start)
    return best


def _module(loop: _Loop, lanes: int) -> ir.IRModule:
    """weights [vectors, lanes * 4] uint8 -> sums [chains * lanes] int32."""
    chains, dtype = loop.chains, f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def main(
        weights: T.Buffer((loop.vectors, lanes * 4), "uint8"),
        out: T.Buffer((chains * lanes,), "int32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})  # else the weights would be loaded again each time
        sums = T.alloc_buffer((chains, lanes), "int32")
        for chain in T.unroll(chains):
            sums[chain, 0:lanes] = T.broadcast(chain, lanes)
        for _ in range(STEPS):
            for chain in T.unroll(chains):
                sums[chain, 0:lanes] = loop.step(weights, sums.vload([chain, 0], dtype))
        for chain in T.unroll(chains):
            out[chain * lanes : chain * lanes + lanes] = sums.vload([chain, 0], dtype)

    return ir.IRModule({"main": main})


def _maddubs(weights: Buffer, total: Expr) -> Expr:
    """The sum is its own activations, so that no product can leave the loop."""
    x = T.reinterpret(total, dtype="int8x32")

    def weight(vector: Expr) -> Expr:
        return weights.vload([vector, 0], "uint8x32")

    return maddubs.mxfp4_dot_part(total, weight, lambda vector: x, T.int32(0))


def _dpbusd(weights: Buffer, total: Expr) -> Expr:
    num_bytes = weights.shape[1]
    w = weights.vload([0, 0], f"uint8x{num_bytes}")
    signed = T.reinterpret(w, dtype=f"int8x{num_bytes}")
    return dpbusd.mxfp4_dot_part(total, lambda vector: w, lambda vector: signed, T.int32(0))


LOOPS = {"maddubs": _Loop(8, 4, _maddubs), "dpbusd": _Loop(12, 1, _dpbusd)}
