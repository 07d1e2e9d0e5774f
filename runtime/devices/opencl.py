"""Run kernels in OpenCL C, and the functions of an artifact: launch after launch, by pyopencl."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import ArtifactError, OsscompileError
from .library_file import read_library
from .memory import DeviceArray, DeviceMemory, Memory, Usage
from .program import MEMORY, Launch, Launches, Program, evaluate

BUILD_OPTIONS = ["-cl-kernel-arg-info"]  # to check what programs say
SCALAR_TYPES = {"int32": "int", "int64": "long"}  # of numpy and of OpenCL C
IMAGE_TYPE = "image1d_buffer_t"  # memory that is read through the texture units, as
TEXEL_BYTES = 16  # four uint32


@dataclass(frozen=True)
class _Opened:
    """A device, with the queue of all but what is timed."""

    cl: ModuleType
    device: Any
    context: Any
    queue: Any
    usage: Usage


@dataclass
class _Prepared:
    """A program with its memory, and for every launch a kernel that knows its buffers."""

    launches: list[tuple[Launch, Any, frozenset[int]]]  # and which arguments it takes as images
    memory: dict[str, Sequence[Memory]]  # by kind of argument; a kernel does not keep it alive
    images: list[Any] = field(default_factory=list)  # of that memory; nor these


class OpenCLDevice(DeviceMemory):
    """Kernels on the first GPU that OpenCL lists, or else on its first device.

    `source`: OpenCL C, `programs`: what launches its kernels. `opened`: of kernels beside which
    these are loaded, for the same memory; `sha256`: of the source. Raises OsscompileError where
    there is no device or no room, ArtifactError for kernels that it cannot compile or programs that
    do not fit them.
    """

    def __init__(
        self,
        source: Path,
        programs: Mapping[str, Launches],
        opened: _Opened | None = None,
        sha256: str | None = None,
    ) -> None:
        self._source = source
        self.opened = opened if opened is not None else self.open()
        super().__init__(programs, self.opened.usage)
        self._cl, self._queue = self.opened.cl, self.opened.queue
        try:
            text = read_library(source, sha256).decode()
            self._kernels = self._cl.Program(self.opened.context, text).build(BUILD_OPTIONS)
        except (self._cl.Error, UnicodeDecodeError) as error:
            raise self._cannot_run(error) from error
        self._prepared: dict[str, _Prepared] = {}
        self.array_limit = int(self.opened.device.max_mem_alloc_size)

    @staticmethod
    def open() -> _Opened:
        """The device, without kernels. Raises OsscompileError where there is none."""
        cl = _import_pyopencl()
        device = _first_device(cl)
        context = cl.Context([device])
        return _Opened(cl, device, context, cl.CommandQueue(context), Usage())

    @property
    def name(self) -> str:
        device = self.opened.device
        return f"{device.name.strip()} (OpenCL driver {device.driver_version.strip()})"

    def run(
        self, function: str, inputs: Sequence[np.ndarray], bound: Sequence[Memory]
    ) -> DeviceArray:
        program = self._programs[function]
        assert isinstance(program, Program)
        prepared = self._prepare(function, bound)
        values = program.bind(inputs)
        try:
            for memory, array in zip(prepared.memory["input"], inputs, strict=True):
                self._write(memory, array, 0)
            self._launch_all(prepared, values, self._queue)
        except self._cl.Error as error:
            raise self._cannot_run(error) from error
        shape = tuple(evaluate(extent, values) for extent in program.result_shape)
        return DeviceArray(prepared.memory["storage"][program.result], shape)

    def call(self, name: str, bound: Sequence[Any]) -> None:
        """Launch what takes no inputs, and wait for it."""
        try:
            self._launch_all(self._prepare(name, bound), {}, self._queue)
            self._queue.finish()
        except self._cl.Error as error:
            raise self._cannot_run(error) from error

    def seconds(self, name: str, calls: Sequence[Sequence[Any]]) -> float:
        """A call of what takes no inputs, on average, each bound to memory of its own: what the
        device's clock says that its kernels took, without what lies between them."""
        profiling = self._cl.command_queue_properties.PROFILING_ENABLE
        queue = self._cl.CommandQueue(self.opened.context, properties=profiling)
        events = []
        try:
            for bound in calls:
                events += self._launch_all(self._prepare(name, bound), {}, queue)
            queue.finish()
            nanoseconds = sum(event.profile.end - event.profile.start for event in events)
        except self._cl.Error as error:
            raise self._cannot_run(error) from error
        return float(nanoseconds * 1e-9 / len(calls))

    def is_alive(self) -> bool:
        """Whether it can still be used: what a kernel did may have ended that."""
        try:
            self._queue.finish()
        except self._cl.Error:
            return False
        return True

    def _launch_all(self, prepared: _Prepared, values: Mapping[str, int], queue: Any) -> list[Any]:
        """The event of every launch."""
        events = []
        for launch, kernel, _ in prepared.launches:
            counts = [evaluate(count, values) for count in launch.groups]
            if 0 in counts:
                continue
            for i, (kind, value) in enumerate(launch.arguments):
                if kind not in MEMORY:
                    kernel.set_arg(i, np.dtype(kind).type(evaluate(value, values)))
            work_items = [n * threads for n, threads in zip(counts, launch.threads, strict=True)]
            enqueue = self._cl.enqueue_nd_range_kernel
            events.append(enqueue(queue, kernel, work_items, launch.threads))
        return events

    def _prepare(self, name: str, bound: Sequence[Any]) -> _Prepared:
        prepared = self._prepared.get(name)
        try:
            if prepared is None:
                kernels = [(n, *self._kernel(n)) for n in self._programs[name].launches]
                prepared = self._prepared[name] = _Prepared(kernels, self.own_memory(name))
            if prepared.memory.get("bound") is not bound:
                memory, images = prepared.memory | {"bound": bound}, []
                for launch, kernel, as_images in prepared.launches:
                    for i, (kind, value) in enumerate(launch.arguments):
                        if kind in MEMORY:
                            handle = memory[kind][value].handle
                            if i in as_images:
                                images.append(handle := self._image(memory[kind][value]))
                            kernel.set_arg(i, handle)
                prepared.memory, prepared.images = memory, images
        except (self._cl.Error, ValueError) as error:
            raise self._cannot_run(error) from error
        return prepared

    def _kernel(self, launch: Launch) -> tuple[Any, frozenset[int]]:
        """And which arguments it takes as images. Raises ValueError for a program that gives it
        others: a driver may take a number for an address."""
        if launch.shared_bytes:  # OpenCL has no such memory that a kernel does not declare
            raise ValueError(f"{launch.kernel}: {launch.shared_bytes} bytes of shared memory")
        kernel, info = self._cl.Kernel(self._kernels, launch.kernel), self._cl.kernel_arg_info
        everywhere = self._cl.kernel_arg_address_qualifier.GLOBAL
        images, wanted = set(), []
        for i in range(kernel.num_args):
            type_name = kernel.get_arg_info(i, info.TYPE_NAME)
            if type_name == IMAGE_TYPE:
                images.add(i)
            in_memory = i in images or kernel.get_arg_info(i, info.ADDRESS_QUALIFIER) == everywhere
            wanted.append("memory" if in_memory else type_name)
        found = ["memory" if kind in MEMORY else SCALAR_TYPES[kind] for kind, _ in launch.arguments]
        if wanted != found:
            raise ValueError(f"{launch.kernel} takes {wanted}, the program gives {found}")
        return kernel, frozenset(images)

    def _image(self, memory: Memory) -> Any:
        """The memory's whole texels, as an image."""
        cl, width = self._cl, memory.num_bytes // TEXEL_BYTES
        most = self.opened.device.image_max_buffer_size if self.opened.device.image_support else 0
        if width > most:
            raise ValueError(f"images of {width} texels, where {most} is the most")
        texels = cl.ImageFormat(cl.channel_order.RGBA, cl.channel_type.UNSIGNED_INT32)
        flags = cl.mem_flags.READ_ONLY
        return cl.create_image(
            self.opened.context, flags, texels, shape=(width,), buffer=memory.handle
        )

    def read(self, memory: Memory, array: np.ndarray) -> None:
        try:
            self._cl.enqueue_copy(self._queue, array, memory.handle)
        except self._cl.Error as error:  # of a kernel before too
            raise self._cannot_run(error) from error

    def _allocate(self, num_bytes: int) -> Memory:
        flags = self._cl.mem_flags.READ_WRITE
        try:
            buffer = self._cl.Buffer(self.opened.context, flags, num_bytes)
        except self._cl.Error as error:
            raise OsscompileError(
                f"{self.name}: expected room for {num_bytes / 1e6:.1f} MB more, found: "
                f"{error}; load with a smaller context, or compile with a smaller prefill_chunk"
            ) from error
        return Memory(buffer, num_bytes, self.usage)

    def _write(self, memory: Memory, array: np.ndarray, offset: int) -> None:
        self._cl.enqueue_copy(self._queue, memory.handle, array, dst_offset=offset)

    def _copy(self, memory: Memory, target: int, source: int, num_bytes: int) -> None:
        held, offsets = memory.handle, {"src_offset": source, "dst_offset": target}
        self._cl.enqueue_copy(self._queue, held, held, byte_count=num_bytes, **offsets)

    def _zero(self, memory: Memory, offset: int, num_bytes: int) -> None:
        zero = np.zeros(1, np.uint8)
        self._cl.enqueue_fill_buffer(self._queue, memory.handle, zero, offset, num_bytes)

    def _cannot_run(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self._source}: expected kernels that {self.name} can run, found: {error}; compile "
            "them again, or update the device's driver"
        )


def _import_pyopencl() -> ModuleType:
    try:
        return importlib.import_module("pyopencl")
    except ImportError as error:
        raise OsscompileError(
            f"OpenCL: expected the package pyopencl, found: {error}; "
            "install it with `pip install pyopencl`"
        ) from error


def _first_device(cl: Any) -> Any:
    try:
        devices = [device for p in cl.get_platforms() for device in p.get_devices()]
    except cl.Error:  # the loader found no platform
        devices = []
    devices.sort(key=lambda device: not device.type & cl.device_type.GPU)
    if not devices:
        raise OsscompileError(
            "OpenCL: expected a device, found none; install the driver of the GPU, or PoCL to run "
            "on the CPU (`pip install pocl-binary-distribution`)"
        )
    return devices[0]
