"""A launch as CUDA's driver takes it: the structures of `cuLaunchKernelEx`."""

import ctypes
from collections.abc import Sequence

PROGRAMMATIC_SERIALIZATION = 6  # an attribute: the launch may begin before the one before it ends
AXES = 3


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),  # of a union of 64 bytes
        ("rest", ctypes.c_char * 60),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("groups", ctypes.c_uint * AXES),
        ("threads", ctypes.c_uint * AXES),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )

    @classmethod
    def of(
        cls,
        groups: Sequence[int],
        threads: Sequence[int],
        shared_bytes: int,
        stream: ctypes.c_void_p,
        dependent: bool,
    ) -> "LaunchConfig":
        """`groups` and the `threads` of each, along one to three axes; see `program.Launch`."""
        ones = [1] * (AXES - len(groups))
        return cls(
            groups=(*groups, *ones),
            threads=(*threads, *ones),
            shared_bytes=shared_bytes,
            stream=stream,
            attributes=ctypes.pointer(_DEPENDENT),
            num_attributes=int(dependent),
        )


_DEPENDENT = LaunchAttribute(id=PROGRAMMATIC_SERIALIZATION, value=1)
