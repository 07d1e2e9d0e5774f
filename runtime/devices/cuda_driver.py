"""The library of CUDA's driver, with errors in its words."""

import ctypes
from typing import Any

import numpy as np

from ..errors import OsscompileError

DRIVER = "libcuda.so.1"
Handle = ctypes.c_void_p  # of a context, module, function, stream or graph
Address = ctypes.c_uint64  # in the device's memory
_NUMBER, _SIZE, _OUT = ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p  # _OUT: by reference
# What the driver's functions take. All return a status, 0 for success.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_NUMBER,),
    "cuDriverGetVersion": (_OUT,),
    "cuDeviceGet": (_OUT, ctypes.c_int),
    "cuDeviceGetName": (_OUT, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxSetCurrent": (Handle,),
    "cuGetErrorString": (ctypes.c_int, _OUT),
    "cuStreamCreate": (_OUT, _NUMBER),
    "cuStreamDestroy_v2": (Handle,),
    "cuStreamSynchronize": (Handle,),
    "cuStreamBeginCapture_v2": (Handle, ctypes.c_int),
    "cuStreamEndCapture": (Handle, _OUT),
    "cuGraphInstantiateWithFlags": (_OUT, Handle, ctypes.c_ulonglong),
    "cuGraphDestroy": (Handle,),
    "cuGraphUpload": (Handle, Handle),
    "cuGraphLaunch": (Handle, Handle),
    "cuGraphExecDestroy": (Handle,),
    "cuEventCreate": (_OUT, _NUMBER),
    "cuEventRecord": (Handle, Handle),
    "cuEventElapsedTime": (_OUT, Handle, Handle),
    "cuEventDestroy_v2": (Handle,),
    "cuModuleLoadData": (_OUT, ctypes.c_char_p),
    "cuModuleUnload": (Handle,),
    "cuModuleGetFunction": (_OUT, Handle, ctypes.c_char_p),
    "cuFuncGetParamInfo": (Handle, _SIZE, _OUT, _OUT),
    "cuFuncSetAttribute": (Handle, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernelEx": (_OUT, Handle, _OUT, _OUT),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (Address,),
    "cuMemHostAlloc": (_OUT, _SIZE, _NUMBER),
    "cuMemFreeHost": (_OUT,),
    "cuMemsetD8_v2": (Address, ctypes.c_ubyte, _SIZE),
    "cuMemcpyHtoD_v2": (Address, _OUT, _SIZE),
    "cuMemcpyDtoD_v2": (Address, Address, _SIZE),
    "cuMemcpyHtoDAsync_v2": (Address, _OUT, _SIZE, Handle),
    "cuMemcpyDtoHAsync_v2": (_OUT, Address, _SIZE, Handle),
}
FIRST_DEVICE = 0
BLOCKING_STREAM = 0
NAME_BYTES = 256  # of a device, at most


class DriverError(OsscompileError):
    """What the driver said."""


class Driver:
    """Calls of the driver's library that fail with its words. The GPU's context, with all that was
    not freed, goes with the last that holds this object."""

    def __init__(self) -> None:
        self._context = Handle()
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
            raise DriverError(f"CUDA, {name}: {said} ({status})")

    def ignoring(self, name: str, *arguments: Any) -> None:
        """Whatever the driver says: at the end of a process it may be gone before us. Any thread
        may be the one that collects what is freed so."""
        self._library.cuCtxSetCurrent(self._context)
        getattr(self._library, name)(*arguments)

    def enter(self) -> None:
        """Let the calling thread use the GPU."""
        self.call("cuCtxSetCurrent", self._context)

    def __del__(self) -> None:
        if self._context:
            self._library.cuDevicePrimaryCtxRelease_v2(FIRST_DEVICE)

    def free(self, address: int) -> None:
        self.ignoring("cuMemFree_v2", address)

    def open_first_device(self) -> str:
        """Its name and the driver's version."""
        device, version = ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(NAME_BYTES)
        try:
            self.call("cuInit", 0)
            self.call("cuDeviceGet", ctypes.byref(device), FIRST_DEVICE)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
            self.enter()
            self.call("cuDeviceGetName", name, NAME_BYTES, device)
            self.call("cuDriverGetVersion", ctypes.byref(version))
        except DriverError as error:
            raise OsscompileError(
                f"CUDA: expected a GPU, found: {error}; is one there, and is its driver loaded "
                "(`nvidia-smi`)?"
            ) from error
        major, minor = version.value // 1000, version.value % 1000 // 10
        return f"{name.value.decode(errors='replace')} (CUDA driver {major}.{minor})"

    def parameter_sizes(self, function: Handle, most: int) -> list[int]:
        """Bytes of every parameter of a kernel; of one more than `most` if it has them."""
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        for index in range(most + 1):
            try:
                out = ctypes.byref(offset), ctypes.byref(size)
                self.call("cuFuncGetParamInfo", function, index, *out)
            except DriverError:  # there is no such parameter
                break
            sizes.append(size.value)
        return sizes


class Stream:
    """What is done one after the other, until this object goes."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self.handle = driver, Handle()
        driver.call("cuStreamCreate", ctypes.byref(self.handle), BLOCKING_STREAM)

    def __del__(self) -> None:
        if self.handle:
            self._driver.ignoring("cuStreamDestroy_v2", self.handle)


def pointer(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
