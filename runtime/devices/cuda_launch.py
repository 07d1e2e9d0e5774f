"""A launch as CUDA's driver takes it: the structures of `cuLaunchKernelEx`."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from .program import MEMORY, Expression, Launch, evaluate

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


class Numbers(dict[Any, int]):
    """What expressions come to in a call, in which the symbols stand for `values`."""

    def __init__(self, values: Mapping[str, int]) -> None:
        super().__init__()
        self._values = values

    def __missing__(self, expression: Expression) -> int:
        self[expression] = number = evaluate(expression, self._values)
        return number


class ReadyLaunch:
    """A launch on certain memory, as the driver takes it: only what depends on a call is set in
    one. `addresses`: of the memory, by kind of argument; each is a uint64 in the device's."""

    def __init__(
        self,
        launch: Launch,
        function: ctypes.c_void_p,
        addresses: Mapping[str, Sequence[int]],
        stream: ctypes.c_void_p,
    ) -> None:
        self.function = function
        self._groups, self._changing = launch.groups, []
        given: list[Any] = []
        for kind, value in launch.arguments:
            if kind in MEMORY:
                given.append(ctypes.c_uint64(addresses[kind][value]))
                continue
            given.append((ctypes.c_int32 if kind == "int32" else ctypes.c_int64)(0))
            self._changing.append((given[-1], value))
        self._given = given  # what the pointers point to
        self.pointers = (ctypes.c_void_p * len(given))(*map(ctypes.addressof, given))
        ones = [1] * len(launch.groups)
        self._config = LaunchConfig.of(
            ones, launch.threads, launch.shared_bytes, stream, launch.dependent
        )
        self.config = ctypes.byref(self._config)

    def set(self, numbers: Numbers) -> bool:
        """Whether anything is launched."""
        for axis, count in enumerate(self._groups):
            self._config.groups[axis] = number = numbers[count]
            if number == 0:
                return False
        for given, value in self._changing:
            given.value = numbers[value]
        return True
