"""The limits of a machine that kernels of our own measure, which are compiled for it.

The compiler is imported when a limit is measured: a bench reads before what a run's memory takes.
"""

from ..runtime.bench.models import Limits, Reader
from ..runtime.devices.tvm_device import TensorDevice
from ..runtime.model import Model


def _open_reader(model: Model) -> Reader:
    device = model._runner.device
    if isinstance(device, TensorDevice):
        from .bandwidth_tensor import TensorReader

        return TensorReader(device, model.manifest.target, model.variant)
    from .bandwidth import Reader

    return Reader()


def _int8_peak() -> float | None:
    from .int8 import int8_peak

    return int8_peak()


LIMITS = Limits(_open_reader, _int8_peak)
