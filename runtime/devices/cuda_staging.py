"""Copies of weights to a GPU, through memory that it reads by itself.

A copy from ordinary memory passes through the driver's own buffers, one thread's work. Here several
threads fill buffers of ours, each of which the GPU reads while others are filled.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np

from ..machine import usable_threads
from .cuda_driver import Driver, Handle, Stream

PIECE_BYTES = 4 << 20
MOST_THREADS = 8  # as many as fill the bus
PORTABLE = 1  # pinned for all contexts


class Staging:
    """Buffers and threads, until this object goes. Raises DriverError without memory for them."""

    def __init__(self, driver: Driver) -> None:
        count = min(MOST_THREADS, usable_threads())
        self._threads = ThreadPoolExecutor(count, "osscompile copies", driver.enter)
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(count):
            self._buffers.put(_Buffer(driver))

    def copy(self, target: int, array: np.ndarray) -> None:
        """Copy a contiguous array to an address of the device, which nothing else uses now; it is
        there when this returns."""
        source = array.reshape(-1).view(np.uint8)

        def copy_piece(start: int) -> None:
            buffer = self._buffers.get()  # there are as many as threads
            try:
                buffer.copy(target + start, source[start : start + PIECE_BYTES])
            finally:
                self._buffers.put(buffer)

        for _ in self._threads.map(copy_piece, range(0, source.size, PIECE_BYTES)):
            pass  # the first error is raised

    def __del__(self) -> None:
        self._threads.shutdown(wait=False)


class _Buffer:
    """Pinned memory, with a stream of its own."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._address = driver, Handle()
        self._stream = Stream(driver)
        driver.call("cuMemHostAlloc", ctypes.byref(self._address), PIECE_BYTES, PORTABLE)
        pointer = ctypes.cast(self._address, ctypes.POINTER(ctypes.c_uint8))
        self._bytes = np.ctypeslib.as_array(pointer, (PIECE_BYTES,))

    def copy(self, target: int, piece: np.ndarray) -> None:
        self._bytes[: piece.size] = piece
        copied = target, self._address, piece.size, self._stream.handle
        self._driver.call("cuMemcpyHtoDAsync_v2", *copied)
        self._driver.call("cuStreamSynchronize", self._stream.handle)

    def __del__(self) -> None:
        if self._address:
            self._driver.ignoring("cuMemFreeHost", self._address)
