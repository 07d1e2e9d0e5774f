"""The target whose kernels run on this machine's OpenCL device, and whether there is one."""

from __future__ import annotations

import pytest

from osscompile import targets
from osscompile.runtime.devices.opencl import _first_device, _import_pyopencl
from osscompile.runtime.errors import OsscompileError

(OPENCL,) = targets.load_variants("snapdragon-gpu")


def missing() -> str | None:
    """Say what is missing to run OpenCL here."""
    try:
        _first_device(_import_pyopencl())
    except OsscompileError as error:
        return str(error)
    return None


MISSING = missing()
needs_opencl = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
