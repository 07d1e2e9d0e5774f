"""Run CUDA kernels, and the functions of an artifact, through the driver's own library.

A function is recorded as a CUDA graph when it is called again with as many rows; from then on such
a call copies the tokens and their positions to the device and launches the graph. Logits stay
there, unless they are asked for.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError, OsscompileError
from .cuda_driver import Address, Driver, DriverError, Handle, Stream, pointer
from .cuda_launch import Numbers, ReadyLaunch
from .cuda_staging import Staging
from .library_file import read_library
from .memory import DeviceArray, DeviceMemory, Memory, Usage
from .program import MEMORY, Launch, Launches, Program, evaluate

SIZES = {"int32": 4, "int64": 8}  # bytes of a scalar; those of an address are 8
MOST_GRAPHS = 64  # of a function: each takes about a megabyte
MOST_SEEN = 4096  # numbers of rows of which it is known that they came before
TIMING_EVENT = 0
MAX_DYNAMIC_SHARED_BYTES = 8  # attribute of a function
RELAXED = 2  # capture: other threads may do what they like
STAGED_BYTES = 4 << 20  # of a copy from the host, at least, that goes through pinned memory


class CudaDevice(DeviceMemory):
    """Kernels on the first GPU that CUDA lists.

    `image`: machine code, or PTX, `programs`: what launches its kernels. `opened`: of kernels
    beside which these are loaded, for the same memory; `sha256`: of the image. Raises
    OsscompileError where there is no GPU or no room, ArtifactError for kernels that it cannot run
    or programs that do not fit them.
    """

    def __init__(
        self,
        image: Path,
        programs: Mapping[str, Launches],
        opened: "_Opened | None" = None,
        sha256: str | None = None,
    ) -> None:
        self._image = image
        self.opened = opened if opened is not None else self.open()
        super().__init__(programs, self.opened.usage)
        self._driver, self._stream = self.opened.driver, self.opened.stream.handle
        self._prepared: dict[str, _Prepared] = {}  # goes before the kernels that it launches
        code = read_library(image, sha256)
        try:
            self._module = _Module(self._driver, self.opened.stream, code)
        except DriverError as error:
            raise self._cannot_run(error) from error

    @staticmethod
    def open() -> "_Opened":
        """The GPU, without kernels. Raises OsscompileError where there is none."""
        driver = Driver()
        name = driver.open_first_device()
        return _Opened(name, driver, Stream(driver), Usage(), cache(lambda: Staging(driver)))

    @property
    def name(self) -> str:
        return self.opened.name

    def run(
        self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Memory]
    ) -> DeviceArray:
        program, driver = self._programs[function], self._driver
        assert isinstance(program, Program)
        prepared = self._prepare(function, bound)
        values = program.bind(inputs)
        try:
            for memory, array in zip(prepared.memory["input"], inputs, strict=True):
                address, source = memory.handle, pointer(array)
                driver.call("cuMemcpyHtoDAsync_v2", address, source, array.nbytes, self._stream)
            self._launch(prepared, values)
        except DriverError as error:
            raise self._cannot_run(error) from error
        shape = tuple(evaluate(extent, values) for extent in program.result_shape)
        return DeviceArray(prepared.memory["storage"][program.result], shape)

    def call(self, name: str, bound: Sequence[Any]) -> None:
        """Launch what takes no inputs, and wait for it."""
        try:
            self._launch_all(self._prepare(name, bound), {})
            self._driver.call("cuStreamSynchronize", self._stream)
        except DriverError as error:
            raise self._cannot_run(error) from error

    def seconds(self, name: str, calls: Sequence[Sequence[Any]]) -> float:
        """A call of what takes no inputs, on average, each bound to memory of its own: by the
        device's clock, as one graph, so that what Python takes is not in it."""
        self._prepare(name, calls[0])  # allocates, which a graph must not

        def launch() -> None:
            for bound in calls:
                self._launch_all(self._prepare(name, bound), {})

        driver, stream = self._driver, self._stream
        milliseconds = ctypes.c_float()
        try:
            graph, begin, end = self._record(launch), _Event(driver), _Event(driver)
            driver.call("cuGraphUpload", graph.handle, stream)
            driver.call("cuEventRecord", begin.handle, stream)
            driver.call("cuGraphLaunch", graph.handle, stream)
            driver.call("cuEventRecord", end.handle, stream)
            driver.call("cuStreamSynchronize", stream)
            elapsed = ctypes.byref(milliseconds), begin.handle, end.handle
            driver.call("cuEventElapsedTime", *elapsed)
        except DriverError as error:
            raise self._cannot_run(error) from error
        return milliseconds.value * 1e-3 / len(calls)

    def is_alive(self) -> bool:
        """Whether it can still be used: an address that is none ends that."""
        try:
            self._driver.call("cuStreamSynchronize", self._stream)
        except DriverError:
            return False
        return True

    def _prepare(self, name: str, bound: Sequence[Any]) -> "_Prepared":
        prepared = self._prepared.get(name)
        if prepared is None:
            launches = [
                (launch, self._function(launch)) for launch in self._programs[name].launches
            ]
            prepared = self._prepared[name] = _Prepared(launches, self.own_memory(name))
        if prepared.memory.get("bound") is not bound:
            prepared.bind(bound, self._stream)
        return prepared

    def _record(self, launch: Callable[[], object]) -> "_Graph":
        """What is launched meanwhile, to be launched at once."""
        driver, graph = self._driver, Handle()
        driver.call("cuStreamBeginCapture_v2", self._stream, RELAXED)
        try:
            launch()
        except BaseException:
            driver.ignoring("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            raise
        driver.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        return _Graph(driver, graph)

    def _function(self, launch: Launch) -> Handle:
        """The kernel of a launch; a driver would read arguments that are not there."""
        function = Handle()
        try:
            name = launch.kernel.encode("ascii")
            self._driver.call(
                "cuModuleGetFunction", ctypes.byref(function), self._module.handle, name
            )
        except DriverError as error:
            raise self._cannot_run(f"{launch.kernel}: {error}") from error
        wanted = self._driver.parameter_sizes(function, len(launch.arguments))
        found = [8 if kind in MEMORY else SIZES[kind] for kind, _ in launch.arguments]
        if wanted != found:
            raise self._cannot_run(
                f"{launch.kernel} takes parameters of {wanted} bytes, the program gives {found}"
            )
        try:
            attribute = MAX_DYNAMIC_SHARED_BYTES, launch.shared_bytes
            self._driver.call("cuFuncSetAttribute", function, *attribute)
        except DriverError as error:
            raise self._cannot_run(f"{launch.kernel}: {error}") from error
        return function

    def _launch(self, prepared: "_Prepared", values: Mapping[str, int]) -> None:
        """Launch what is prepared: as a graph, if it was called with these values before."""
        key = tuple(values.values())
        graph = prepared.graphs.pop(key, None)
        if graph is None and (key in prepared.seen or not values):
            graph = self._record(lambda: self._launch_all(prepared, values))
        if graph is None:
            if len(prepared.seen) == MOST_SEEN:
                prepared.seen.clear()
            prepared.seen.add(key)
            self._launch_all(prepared, values)
            return
        prepared.graphs[key] = graph  # the last is the one used last
        if len(prepared.graphs) > MOST_GRAPHS:
            del prepared.graphs[next(iter(prepared.graphs))]
        self._driver.call("cuGraphLaunch", graph.handle, self._stream)

    def _launch_all(self, prepared: "_Prepared", values: Mapping[str, int]) -> None:
        numbers = Numbers(values)
        for launch in prepared.ready:
            if launch.set(numbers):
                arguments = launch.config, launch.function, launch.pointers, None
                self._driver.call("cuLaunchKernelEx", *arguments)

    def read(self, memory: Memory, array: np.ndarray) -> None:
        target = pointer(array)
        copied = target, memory.handle, array.nbytes, self._stream
        try:
            self._driver.call("cuMemcpyDtoHAsync_v2", *copied)
            self._driver.call("cuStreamSynchronize", self._stream)
        except DriverError as error:  # of a kernel before too
            raise self._cannot_run(error) from error

    def _allocate(self, num_bytes: int) -> Memory:
        address = Address()
        try:
            self._driver.call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
        except DriverError as error:
            raise OsscompileError(
                f"GPU: expected room for {num_bytes / 1e6:.1f} MB more, found: {error}; load with "
                "a smaller context, or compile with a smaller prefill_chunk"
            ) from error
        return Memory(address.value, num_bytes, self.usage, self._driver.free)

    def _write(self, memory: Memory, array: np.ndarray, offset: int) -> None:
        target = memory.handle + offset
        if array.nbytes < STAGED_BYTES:
            self._driver.call("cuMemcpyHtoD_v2", target, pointer(array), array.nbytes)
            return
        self._driver.call("cuStreamSynchronize", self._stream)  # what may use the memory still
        self.opened.staging().copy(target, array)

    def _copy(self, memory: Memory, target: int, source: int, num_bytes: int) -> None:
        start = memory.handle
        self._driver.call("cuMemcpyDtoD_v2", start + target, start + source, num_bytes)

    def _zero(self, memory: Memory, offset: int, num_bytes: int) -> None:
        self._driver.call("cuMemsetD8_v2", memory.handle + offset, 0, num_bytes)

    def _cannot_run(self, found: object) -> ArtifactError:
        return ArtifactError(
            f"{self._image}: expected kernels that this GPU can run, found: {found}; compile them "
            "again for this GPU, or update its driver"
        )


@dataclass(frozen=True)
class _Opened:
    """A GPU, with the stream of everything that is done on it."""

    name: str
    driver: Driver
    stream: Stream
    usage: Usage
    staging: Callable[[], Staging]  # when there is something large to copy, and then the same


class _Prepared:
    """A program with its memory and its kernels."""

    def __init__(
        self, launches: list[tuple[Launch, Handle]], own_memory: dict[str, Sequence[Memory]]
    ) -> None:
        self._launches, self.memory = launches, own_memory  # by kind of argument
        self.ready: list[ReadyLaunch] = []
        self.seen: set[tuple[int, ...]] = set()  # numbers of rows in calls
        self.graphs: dict[tuple[int, ...], _Graph] = {}  # by them

    def bind(self, bound: Sequence[Any], stream: Handle) -> None:
        """From now on all is launched on this memory."""
        self.memory = self.memory | {"bound": bound}
        self.graphs = {}
        addresses = {kind: [m.handle for m in some] for kind, some in self.memory.items()}
        self.ready = [ReadyLaunch(n, function, addresses, stream) for n, function in self._launches]


class _Module:
    """Kernels that are loaded, until this object goes."""

    def __init__(self, driver: Driver, stream: Stream, code: bytes) -> None:
        self._driver, self._stream, self.handle = driver, stream, Handle()
        driver.call("cuModuleLoadData", ctypes.byref(self.handle), code)

    def __del__(self) -> None:
        if self.handle:
            self._driver.ignoring("cuStreamSynchronize", self._stream.handle)  # they may run still
            self._driver.ignoring("cuModuleUnload", self.handle)


class _Graph:
    """Ready to be launched, until this object goes. Takes what was captured."""

    def __init__(self, driver: Driver, captured: Handle) -> None:
        self._driver, self.handle = driver, Handle()
        try:
            driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self.handle), captured, 0)
        finally:
            driver.ignoring("cuGraphDestroy", captured)

    def __del__(self) -> None:
        if self.handle:
            self._driver.ignoring("cuGraphExecDestroy", self.handle)


class _Event:
    """A time on the device's clock."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self.handle = driver, Handle()
        driver.call("cuEventCreate", ctypes.byref(self.handle), TIMING_EVENT)

    def __del__(self) -> None:
        if self.handle:
            self._driver.ignoring("cuEventDestroy_v2", self.handle)
