"""Machines that measure the candidates of a kernel: they load them, make their arguments, call and
time them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..devices.launch_devices import LAUNCH_DEVICES, LaunchDevice
from ..devices.tvm_cpu import tensor
from ..devices.tvm_memory import TensorMemory
from ..devices.tvm_runtime import load_function
from ..errors import TuningError
from ..manifest import CPU
from .files import CHECKED, TIMED, Candidate, Plan

FUNCTION = "kernel"  # its name in every library
GUARD_BYTES = 1 << 20  # covers rows of a tile that do not exist
GUARD = 0xA5


class TrialMachine:
    """A machine, or a device of one. A kernel's arguments come from `tensor` and `output`."""

    most_calls: int | None = None  # that `seconds` takes at once

    def load(self, folder: Path, candidate: Candidate) -> Any:
        """Load the candidate's kernel; may raise anything."""
        raise NotImplementedError

    def tensor(self, array: np.ndarray) -> Any:
        """Return a tensor with the aligned array's contents, perhaps in the array's memory."""
        raise NotImplementedError

    def output(self, array: np.ndarray) -> Any:
        """Return such a tensor for an argument that a call writes."""
        return self.tensor(array)

    def array(self, written: Any, like: np.ndarray) -> np.ndarray:
        """Return what an output holds, in the shape and type of `like`; raises TuningError if a
        write beyond it is found."""
        raise NotImplementedError

    def call(self, kernel: Any, arguments: Sequence[Any]) -> None:
        """Call a kernel with arguments of `check_shape`."""
        raise NotImplementedError

    def seconds(self, kernel: Any, calls: Sequence[Sequence[Any]]) -> float:
        """Return the mean seconds of a call with arguments of `shape`."""
        raise NotImplementedError

    def is_alive(self) -> bool:
        """Whether another candidate can be measured after one that failed."""
        return True


class Cpu(TrialMachine):
    """This machine; the clock is the host's."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def load(self, folder: Path, candidate: Candidate) -> Any:
        return load_function(folder / candidate.library, FUNCTION, self._threads)

    def tensor(self, array: np.ndarray) -> Any:
        return tensor(array)

    def array(self, written: Any, like: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.from_dlpack(written)
        return result

    def call(self, kernel: Any, arguments: Sequence[Any]) -> None:
        kernel(*arguments)

    def seconds(self, kernel: Any, calls: Sequence[Sequence[Any]]) -> float:
        start = time.perf_counter()
        for arguments in calls:
            kernel(*arguments)
        return (time.perf_counter() - start) / len(calls)


class Launched(TrialMachine):
    """A device of this machine on which the runtime launches kernels; the clock is the device's.
    Raises OsscompileError if there is none."""

    most_calls = 512  # Python takes some 20 us to prepare each

    def __init__(self, runtime: str) -> None:
        self._device = LAUNCH_DEVICES[runtime]
        self._opened: Any = self._device.open()
        self._memory: LaunchDevice | None = None  # of any kernel: all share it

    def load(self, folder: Path, candidate: Candidate) -> LaunchDevice:
        assert candidate.programs is not None
        kernel = self._device(folder / candidate.library, candidate.programs, self._opened)
        self._memory = self._memory or kernel
        return kernel

    def tensor(self, array: np.ndarray) -> Any:
        assert self._memory is not None, "a kernel is loaded first"
        return self._memory.tensor(array)

    def output(self, array: np.ndarray) -> Any:
        return self.tensor(_guarded(array))

    def array(self, written: Any, like: np.ndarray) -> np.ndarray:
        assert self._memory is not None
        found = np.empty(like.nbytes + GUARD_BYTES, np.uint8)
        self._memory.read(written, found)
        return _unguarded(found, like)

    def call(self, kernel: LaunchDevice, arguments: Sequence[Any]) -> None:
        kernel.call(CHECKED, arguments)

    def seconds(self, kernel: LaunchDevice, calls: Sequence[Sequence[Any]]) -> float:
        return kernel.seconds(TIMED, calls)

    def is_alive(self) -> bool:
        return self._memory is None or self._memory.is_alive()


class TensorMachine(TrialMachine):
    """A device here on which TVM's runtime launches kernels; the clock is the host's, see
    `TensorMemory.seconds`. Raises OsscompileError if there is none."""

    def __init__(self, device: str, threads: int) -> None:
        self._memory, self._threads = TensorMemory(device), threads

    def load(self, folder: Path, candidate: Candidate) -> Any:
        return load_function(folder / candidate.library, FUNCTION, self._threads)

    def tensor(self, array: np.ndarray) -> Any:
        return self._memory.tensor(array)

    def output(self, array: np.ndarray) -> Any:
        whole = self._memory.tensor(_guarded(array))
        return _Output(whole, self._memory.view(whole, array.shape, str(array.dtype)))

    def array(self, written: Any, like: np.ndarray) -> np.ndarray:
        return _unguarded(self._memory.numpy(written.whole), like)

    def call(self, kernel: Any, arguments: Sequence[Any]) -> None:
        kernel(*(a.tensor if isinstance(a, _Output) else a for a in arguments))
        self._memory.synchronize()

    def seconds(self, kernel: Any, calls: Sequence[Sequence[Any]]) -> float:
        return self._memory.seconds(kernel, calls)

    def is_alive(self) -> bool:
        try:
            self._memory.synchronize()
        except Exception:  # TVM may raise anything for the driver's errors
            return False
        return True


@dataclass(frozen=True)
class _Output:
    """A tensor, and the bytes at whose beginning it lies."""

    whole: Any
    tensor: Any


def _guarded(array: np.ndarray) -> np.ndarray:
    """Return an array's bytes with a guard behind them: devices do not fault past an array."""
    guard = np.full(GUARD_BYTES, GUARD, np.uint8)
    return np.concatenate([array.reshape(-1).view(np.uint8), guard])


def _unguarded(found: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return the array in guarded bytes. Raises TuningError if the guard is not whole."""
    if (found[like.nbytes :] != GUARD).any():
        raise TuningError("writes beyond the end of its result")
    return found[: like.nbytes].view(like.dtype).reshape(like.shape)


def open_machine(plan: Plan, threads: int) -> TrialMachine:
    """Open the machine that a plan needs. Raises OsscompileError if there is none."""
    if plan.runtime in LAUNCH_DEVICES:
        return Launched(plan.runtime)
    return Cpu(threads) if plan.device == CPU else TensorMachine(plan.device, threads)
