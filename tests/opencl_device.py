"""Whether this machine has an OpenCL device, and the target whose kernels it runs."""

from __future__ import annotations

import pytest

from osscompile import targets
from osscompile.runtime.devices.opencl import _first_device, _import_pyopencl
from osscompile.runtime.errors import OsscompileError

(OPENCL,) = targets.load_variants("snapdragon-gpu")


def missing() -> str | None:
    """What is missing to run OpenCL here."""
    try:
        _first_device(_import_pyopencl())
    except OsscompileError as error:
        return str(error)
    return None


MISSING = missing()
needs_opencl = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
