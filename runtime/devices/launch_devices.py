"""Devices whose kernels the runtime launches itself."""

from typing import TypeAlias

from .cuda import CudaDevice
from .opencl import OpenCLDevice

LaunchDevice: TypeAlias = OpenCLDevice | CudaDevice
LAUNCH_DEVICES: dict[str, type[OpenCLDevice] | type[CudaDevice]] = {  # by a manifest's `runtime`
    "opencl": OpenCLDevice,
    "cuda": CudaDevice,
}
