"""Run the functions of a CUDA artifact, through the driver's own library.

A function of one token is recorded as a CUDA graph when it is first called; from then on a call
copies the token and its position to the device, launches the graph, and copies the logits back.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .device_memory import DeviceMemory
from .errors import ArtifactError, OsscompileError
from .program import MEMORY, Launch, Program, evaluate

DRIVER = "libcuda.so.1"
Handle = ctypes.c_void_p  # of a context, module, function, stream or graph
Address = ctypes.c_uint64  # in the device's memory
SIZES = {"int32": 4, "int64": 8}  # bytes of a scalar; those of an address are 8
_NUMBER, _SIZE, _OUT = ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p  # _OUT: by reference
# Of the driver's functions: what they take. All return a status, 0 for success.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_NUMBER,),
    "cuDeviceGet": (_OUT, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, ctypes.c_int),
    "cuCtxSetCurrent": (Handle,),
    "cuGetErrorString": (ctypes.c_int, _OUT),
    "cuStreamCreate": (_OUT, _NUMBER),
    "cuStreamSynchronize": (Handle,),
    "cuStreamBeginCapture_v2": (Handle, ctypes.c_int),
    "cuStreamEndCapture": (Handle, _OUT),
    "cuGraphInstantiateWithFlags": (_OUT, Handle, ctypes.c_ulonglong),
    "cuGraphLaunch": (Handle, Handle),
    "cuModuleLoadData": (_OUT, ctypes.c_char_p),
    "cuModuleGetFunction": (_OUT, Handle, ctypes.c_char_p),
    "cuFuncGetParamInfo": (Handle, _SIZE, _OUT, _OUT),
    "cuLaunchKernel": (Handle, *[_NUMBER] * 7, Handle, _OUT, _OUT),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (Address,),
    "cuMemsetD8_v2": (Address, ctypes.c_ubyte, _SIZE),
    "cuMemcpyHtoD_v2": (Address, _OUT, _SIZE),
    "cuMemcpyDtoD_v2": (Address, Address, _SIZE),
    "cuMemcpyHtoDAsync_v2": (Address, _OUT, _SIZE, Handle),
    "cuMemcpyDtoHAsync_v2": (_OUT, Address, _SIZE, Handle),
}
BLOCKING_STREAM = 0
RELAXED = 2  # capture: other threads may do what they like


class CudaDevice(DeviceMemory):
    """The kernels of an artifact on the first GPU that CUDA lists.

    `image`: machine code, `programs`: what launches its kernels. Raises OsscompileError where there
    is no GPU or no room, ArtifactError for kernels that it cannot run or programs that do not fit
    them.
    """

    def __init__(self, image: Path, programs: dict[str, Program]) -> None:
        self._image, self._programs = image, programs
        self._driver = _Driver()
        self._driver.open_first_device()
        self._stream = Handle()
        self._driver.call("cuStreamCreate", ctypes.byref(self._stream), BLOCKING_STREAM)
        self._module = Handle()
        try:
            code = image.read_bytes()
            self._driver.call("cuModuleLoadData", ctypes.byref(self._module), code)
        except (OSError, _DriverError) as error:
            raise self._cannot_run(error) from error
        self._prepared: dict[str, _Prepared] = {}

    def run(self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Any]) -> np.ndarray:
        """Call a function with small inputs, int32, and memory bound before -> float32."""
        program, driver = self._programs[function], self._driver
        prepared = self._prepared.get(function)
        if prepared is None or prepared.memory["bound"] is not bound:
            prepared = self._prepared[function] = self._prepare(program, bound)
        tokens = len(inputs[0])
        result = np.empty([evaluate(e, tokens) for e in program.result_shape], np.float32)
        try:
            for memory, array in zip(prepared.memory["input"], inputs, strict=True):
                address, source = memory.address, _pointer(array)
                driver.call("cuMemcpyHtoDAsync_v2", address, source, array.nbytes, self._stream)
            if prepared.graph is not None:
                driver.call("cuGraphLaunch", prepared.graph, self._stream)
            else:
                self._launch_all(prepared, tokens)
            logits, target = prepared.memory["storage"][program.result].address, _pointer(result)
            driver.call("cuMemcpyDtoHAsync_v2", target, logits, result.nbytes, self._stream)
            driver.call("cuStreamSynchronize", self._stream)
        except _DriverError as error:
            raise self._cannot_run(error) from error
        return result

    def _prepare(self, program: Program, bound: Sequence[Any]) -> "_Prepared":
        prepared = _Prepared(
            memory=self.memory_of(program, bound),
            launches=[(launch, self._function(launch)) for launch in program.launches],
        )
        if program.max_tokens == 1:  # nothing changes from call to call
            driver, graph = self._driver, Handle()
            driver.call("cuStreamBeginCapture_v2", self._stream, RELAXED)
            self._launch_all(prepared, 1)
            driver.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            prepared.graph = Handle()
            driver.call("cuGraphInstantiateWithFlags", ctypes.byref(prepared.graph), graph, 0)
        return prepared

    def _function(self, launch: Launch) -> Handle:
        """The kernel of a launch; a driver would read arguments that are not there."""
        function = Handle()
        try:
            name = launch.kernel.encode("ascii")
            self._driver.call("cuModuleGetFunction", ctypes.byref(function), self._module, name)
        except _DriverError as error:
            raise self._cannot_run(f"{launch.kernel}: {error}") from error
        wanted = self._driver.parameter_sizes(function, len(launch.arguments))
        found = [8 if kind in MEMORY else SIZES[kind] for kind, _ in launch.arguments]
        if wanted != found:
            raise self._cannot_run(
                f"{launch.kernel} takes parameters of {wanted} bytes, the program gives {found}"
            )
        return function

    def _launch_all(self, prepared: "_Prepared", tokens: int) -> None:
        for launch, function in prepared.launches:
            values: list[Any] = []
            for kind, value in launch.arguments:
                if kind in MEMORY:
                    values.append(Address(prepared.memory[kind][value].address))
                else:
                    number = evaluate(value, tokens)
                    values.append((ctypes.c_int32 if kind == "int32" else ctypes.c_int64)(number))
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
            groups = [evaluate(count, tokens) for count in launch.groups]
            sizes = [*groups, *[1] * (3 - len(groups))]
            sizes += [*launch.threads, *[1] * (3 - len(groups))]
            self._driver.call("cuLaunchKernel", function, *sizes, 0, self._stream, pointers, None)

    def _allocate(self, num_bytes: int) -> "_Memory":
        address = Address()
        try:
            self._driver.call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
        except _DriverError as error:
            raise OsscompileError(
                f"GPU: expected room for {num_bytes / 1e6:.1f} MB more, found: {error}; load with "
                "a smaller context, or compile with a smaller prefill_chunk"
            ) from error
        return _Memory(self._driver, address.value)

    def _write(self, memory: Any, array: np.ndarray) -> None:
        self._driver.call("cuMemcpyHtoD_v2", memory.address, _pointer(array), array.nbytes)

    def _copy(self, memory: Any, source: Any, num_bytes: int) -> None:
        self._driver.call("cuMemcpyDtoD_v2", memory.address, source.address, num_bytes)

    def _zero(self, memory: Any, offset: int, num_bytes: int) -> None:
        self._driver.call("cuMemsetD8_v2", memory.address + offset, 0, num_bytes)

    def _cannot_run(self, found: object) -> ArtifactError:
        return ArtifactError(
            f"{self._image}: expected kernels that this GPU can run, found: {found}; compile the "
            "model again for this GPU, or update its driver"
        )


@dataclass
class _Prepared:
    """A program with its memory and its kernels."""

    memory: dict[str, Sequence[Any]]  # by kind of argument
    launches: list[tuple[Launch, Handle]]
    graph: Handle | None = None


class _Memory:
    """Of the device, until this object goes."""

    def __init__(self, driver: "_Driver", address: int) -> None:
        self._driver, self.address = driver, address

    def __del__(self) -> None:
        self._driver.free(self.address)


class _DriverError(OsscompileError):
    """What the driver said."""


class _Driver:
    """Calls of the driver's library that fail with its words."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(DRIVER)
            for name, arguments in SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise OsscompileError(
                f"CUDA: expected the driver's {DRIVER}, of CUDA 12.4 or later, found: {error}; "
                "install NVIDIA's driver"
            ) from error

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown error").decode(errors="replace")
            raise _DriverError(f"CUDA, {name}: {said} ({status})")

    def free(self, address: int) -> None:
        """Whatever the driver says: at the end of a process it may be gone before us."""
        self._library.cuMemFree_v2(address)

    def open_first_device(self) -> None:
        device, context = ctypes.c_int(), Handle()
        try:
            self.call("cuInit", 0)
            self.call("cuDeviceGet", ctypes.byref(device), 0)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self.call("cuCtxSetCurrent", context)
        except _DriverError as error:
            raise OsscompileError(
                f"CUDA: expected a GPU, found: {error}; is one there, and is its driver loaded "
                "(`nvidia-smi`)?"
            ) from error

    def parameter_sizes(self, function: Handle, most: int) -> list[int]:
        """Bytes of every parameter of a kernel; of one more than `most` if it has them."""
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        for index in range(most + 1):
            try:
                out = ctypes.byref(offset), ctypes.byref(size)
                self.call("cuFuncGetParamInfo", function, index, *out)
            except _DriverError:  # there is no such parameter
                break
            sizes.append(size.value)
        return sizes


def _pointer(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
