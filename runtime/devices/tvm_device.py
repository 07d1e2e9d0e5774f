"""Run the functions of a compiled library on a device that has memory of its own: TVM's virtual
machine, and TVM's runtime for that device.

Weights, caches and activations are tensors in that memory; what is copied are token ids, and what
the host asks for of a result.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError, OsscompileError
from .tvm_cpu import CPU, POOLED, aligned_copy, tensor
from .tvm_memory import TensorMemory
from .tvm_runtime import load_function

MOST_INPUTS = 12  # of calls that nobody waited for: of a step, and of the choice of its tokens


class TensorDevice(TensorMemory):
    """A loaded library on the first device of a kind, one of `manifest.DEVICES`.

    `threads`: CPU threads of what the host computes; `needed_bytes`: of the device's memory;
    `sha256`: of the library. Raises OsscompileError without TVM's runtime for that device, without
    the device or without room on it, ArtifactError for kernels that it cannot compile or run.
    """

    def __init__(
        self,
        library: Path,
        device: str,
        threads: int,
        needed_bytes: int,
        sha256: str | None = None,
    ) -> None:
        super().__init__(device)
        self._library, self.needed_bytes = library, needed_bytes
        room = self.room()
        if needed_bytes > room:
            raise OsscompileError(
                f"{device}: expected {needed_bytes / 1e9:.2f} GB that the device may use, found "
                f"{room / 1e9:.2f}; compile the model with a smaller --context"
            )
        self._machine = load_function(library, "vm_load_executable", threads, sha256)()
        # the device and the host, where shapes are computed: (type, id, allocator) each
        self._machine["vm_initialization"](self._kind, 0, POOLED, CPU, 0, POOLED)
        self._functions: dict[str, Any] = {}
        self._inputs: list[Any] = []  # of the last calls

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> Any:
        """Call a function with small inputs, which are copied, and tensors bound before -> what it
        returns, a tensor of the device."""
        if len(self._inputs) + len(inputs) > MOST_INPUTS:
            self._inputs.clear()  # first: to free memory waits for all that the device was told
        with self._report():
            if function not in self._functions:
                self._functions[function] = self._machine[function]
            tensors = [self._input(array) for array in inputs]
            self._inputs += tensors
            return self._functions[function](*tensors, *bound)

    def numpy(self, result: Any) -> np.ndarray:
        """A copy of what a function returned; it waits for the device."""
        with self._report():
            array = super().numpy(result)
        self._inputs.clear()  # which need not be waited for now
        return array

    def seconds(self, function: Callable[..., object], calls: Sequence[Sequence[Any]]) -> float:
        with self._report():
            return super().seconds(function, calls)

    @contextlib.contextmanager
    def _report(self) -> Iterator[None]:
        """Make an error of ours of what TVM raises, which is what the device's driver says."""
        try:
            yield
        except OsscompileError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{self._library}: expected kernels that the {self._name} device can run, found: "
                f"{error}; compile the model again, or update the system"
            ) from error

    def _input(self, array: np.ndarray) -> Any:
        """Like `tensor`, but without waiting until the device has it: what the device is told next
        comes after, and a copy to Metal reads the host's memory at once."""
        held = self.empty(array.shape, str(array.dtype))
        self._copy(tensor(aligned_copy(array)), held)
        return held
