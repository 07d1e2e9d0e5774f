"""Run the functions of an OpenCL artifact: launch after launch, through pyopencl."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .device_memory import DeviceMemory
from .errors import ArtifactError, OsscompileError
from .program import MEMORY, Launch, Program, evaluate

BUILD_OPTIONS = ["-cl-kernel-arg-info"]  # to check what programs say
SCALAR_TYPES = {"int32": "int", "int64": "long"}  # of numpy and of OpenCL C


@dataclass(frozen=True)
class _Prepared:
    """A program with its memory, and for every launch a kernel that knows its buffers."""

    memory: dict[str, Sequence[Any]]  # by kind of argument; a kernel does not keep it alive
    launches: list[tuple[Launch, Any]]


class OpenCLDevice(DeviceMemory):
    """The kernels of an artifact on the first GPU that OpenCL lists, or else on its first device.

    `source`: OpenCL C, `programs`: what launches its kernels. Raises OsscompileError where there is
    no device or no room, ArtifactError for kernels that it cannot compile or programs that do not
    fit them.
    """

    def __init__(self, source: Path, programs: dict[str, Program]) -> None:
        self._source, self._programs = source, programs
        self._cl = _import_pyopencl()
        self._device = _first_device(self._cl)
        self._context = self._cl.Context([self._device])
        self._queue = self._cl.CommandQueue(self._context)
        try:
            text = source.read_text(encoding="utf-8")
            self._kernels = self._cl.Program(self._context, text).build(BUILD_OPTIONS)
        except (self._cl.Error, UnicodeDecodeError) as error:
            raise self._cannot_run(error) from error
        self._prepared: dict[str, _Prepared] = {}

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> np.ndarray:
        """Call a function with small inputs, int32, and memory bound before -> float32."""
        program = self._programs[function]
        prepared = self._prepared.get(function)
        if prepared is None or prepared.memory["bound"] is not bound:
            prepared = self._prepared[function] = self._prepare(program, bound)
        tokens = len(inputs[0])
        result = np.empty([evaluate(e, tokens) for e in program.result_shape], np.float32)
        try:
            for buffer, array in zip(prepared.memory["input"], inputs, strict=True):
                self._cl.enqueue_copy(self._queue, buffer, array)
            for launch, kernel in prepared.launches:
                self._enqueue(launch, kernel, tokens)
            self._cl.enqueue_copy(self._queue, result, prepared.memory["storage"][program.result])
        except self._cl.Error as error:
            raise self._cannot_run(error) from error
        return result

    def _enqueue(self, launch: Launch, kernel: Any, tokens: int) -> None:
        for i, (kind, value) in enumerate(launch.arguments):
            if kind not in MEMORY:
                kernel.set_arg(i, np.dtype(kind).type(evaluate(value, tokens)))
        counts = [evaluate(count, tokens) for count in launch.groups]
        work_items = [n * threads for n, threads in zip(counts, launch.threads, strict=True)]
        self._cl.enqueue_nd_range_kernel(self._queue, kernel, work_items, launch.threads)

    def _prepare(self, program: Program, bound: Sequence[Any]) -> _Prepared:
        memory = self.memory_of(program, bound)
        launches = []
        for launch in program.launches:
            try:
                kernel = self._cl.Kernel(self._kernels, launch.kernel)
                self._check_arguments(launch, kernel)
                for i, (kind, value) in enumerate(launch.arguments):
                    if kind in MEMORY:
                        kernel.set_arg(i, memory[kind][value])
            except (self._cl.Error, ValueError) as error:
                raise self._cannot_run(error) from error
            launches.append((launch, kernel))
        return _Prepared(memory, launches)

    def _check_arguments(self, launch: Launch, kernel: Any) -> None:
        """A driver may take a number for an address."""
        info, addresses = self._cl.kernel_arg_info, self._cl.kernel_arg_address_qualifier
        wanted = []
        for i in range(kernel.num_args):
            in_memory = kernel.get_arg_info(i, info.ADDRESS_QUALIFIER) == addresses.GLOBAL
            wanted.append("memory" if in_memory else kernel.get_arg_info(i, info.TYPE_NAME))
        found = ["memory" if kind in MEMORY else SCALAR_TYPES[kind] for kind, _ in launch.arguments]
        if wanted != found:
            raise ValueError(f"{launch.kernel} takes {wanted}, the program gives {found}")

    def _allocate(self, num_bytes: int) -> Any:
        try:
            return self._cl.Buffer(self._context, self._cl.mem_flags.READ_WRITE, num_bytes)
        except self._cl.Error as error:
            raise OsscompileError(
                f"{self._device.name}: expected room for {num_bytes / 1e6:.1f} MB more, found: "
                f"{error}; load with a smaller context, or compile with a smaller prefill_chunk"
            ) from error

    def _write(self, memory: Any, array: np.ndarray) -> None:
        self._cl.enqueue_copy(self._queue, memory, array)

    def _copy(self, memory: Any, source: Any, num_bytes: int) -> None:
        self._cl.enqueue_copy(self._queue, memory, source)

    def _zero(self, memory: Any, offset: int, num_bytes: int) -> None:
        zero = np.zeros(1, np.uint8)
        self._cl.enqueue_fill_buffer(self._queue, memory, zero, offset, num_bytes)

    def _cannot_run(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self._source}: expected kernels that {self._device.name} "
            f"({self._device.version}) can run, found: {error}; compile the model again, or "
            "update the device's driver"
        )


def _import_pyopencl() -> ModuleType:
    try:
        return importlib.import_module("pyopencl")
    except ImportError as error:
        raise OsscompileError(
            f"OpenCL: expected the package pyopencl, found: {error}; "
            "install it with `pip install pyopencl`"
        ) from error


def _first_device(cl: Any) -> Any:
    try:
        devices = [device for p in cl.get_platforms() for device in p.get_devices()]
    except cl.Error:  # the loader found no platform
        devices = []
    devices.sort(key=lambda device: not device.type & cl.device_type.GPU)
    if not devices:
        raise OsscompileError(
            "OpenCL: expected a device, found none; install the driver of the GPU, or PoCL to run "
            "on the CPU (`pip install pocl-binary-distribution`)"
        )
    return devices[0]
