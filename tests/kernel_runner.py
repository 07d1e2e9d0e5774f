"""Compile one kernel as the pipeline does, and call it on numpy arrays.

Kernels for AArch64 run under emulation if this machine is another (`aarch64.py`).
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aarch64
import cuda_device
import metal_device
import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import ir, tirx
from tvm.sym import Analyzer
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from osscompile.codegen.cuda import cuda_source
from osscompile.codegen.library import build_library
from osscompile.codegen.opencl import opencl_source
from osscompile.codegen.programs import kernel_launches
from osscompile.importer.weights import pack_rows
from osscompile.passes.expand_exp import expand_exp
from osscompile.passes.name_rounding import name_rounding
from osscompile.passes.pack_weights import pack_kernel, packable
from osscompile.passes.split_launches import split_launches
from osscompile.passes.store_halves import store_halves
from osscompile.passes.wait_for_launches import wait_for_launches
from osscompile.runtime.devices.cuda import CudaDevice
from osscompile.runtime.devices.launch_devices import LAUNCH_DEVICES, LaunchDevice
from osscompile.runtime.devices.opencl import OpenCLDevice
from osscompile.runtime.devices.program import Launches
from osscompile.runtime.devices.tvm_runtime import load_function
from osscompile.schedules.records import Choose, recorded
from osscompile.schedules.rule import schedule
from osscompile.targets import Target

Array = NDArray[Any]
Rule = Callable[[PrimFunc, Target, Choose], "tvm.s_tir.Schedule | None"]

_BUILT: dict[tuple[PrimFunc, str, bool, Rule | None], BuiltKernel] = {}


def build(
    kernel: PrimFunc, target: Target, *, scheduled: bool = True, rule: Rule | None = None
) -> BuiltKernel:
    """Pack, schedule (by the target's rules, or only by `rule`), expand exp and compile."""
    key = (kernel, repr(target), scheduled, rule)
    if key not in _BUILT:
        _BUILT[key] = BuiltKernel(kernel, target, scheduled, rule)
    return _BUILT[key]


class BuiltKernel:
    """A compiled kernel that takes weights in the checkpoint's order, and packs them itself."""

    def __init__(
        self, kernel: PrimFunc, target: Target, scheduled: bool, rule: Rule | None
    ) -> None:
        self.kernel, self.lanes = kernel, target.vector_lanes
        self.packed = packable(kernel, self.lanes)
        function = pack_kernel(kernel, self.packed, self.lanes)
        if rule is not None:
            sch = rule(function, target, recorded(function, target))
            assert sch is not None, f"{rule.__name__} declines {kernel.attrs['op']}"
            function = sch.mod["main"]
        elif scheduled:
            function = schedule(function, target)
        self.function = function
        if target.runtime in LAUNCH_DEVICES:
            self.main = LaunchedKernel(function, target)
            return
        module = ir.IRModule({"main": function.with_attr("global_symbol", "main")})
        module = name_rounding(expand_exp(module, target), target)
        self.main = _main(module, target)

    def __call__(self, *inputs: Array, in_place: int = 0) -> Any:
        """Take arrays for the first parameters, and return the others, which the kernel must fill.

        The first `in_place` inputs are written too; their new contents come first. One result
        comes as an array, several come as a tuple.
        """
        symbols: dict[str, int] = {}
        arguments = []
        for i, (parameter, array) in enumerate(
            zip(self.kernel.params, inputs, strict=False)  # the rest are outputs
        ):
            name = f"{self.kernel.attrs['op']}, {parameter.name}"
            assert str(parameter.dtype) == str(array.dtype), (name, parameter.dtype, array.dtype)
            assert len(parameter.shape) == array.ndim, (name, parameter.shape, array.shape)
            for extent, size in zip(parameter.shape, array.shape, strict=True):
                if isinstance(extent, tirx.Var):
                    symbols[extent.name] = size
                assert value_of(extent, symbols) == size, (name, parameter.shape, array.shape)
            if i in self.packed:
                array = pack_rows(array, self.packed[i], self.lanes)
            # a copy, because TVM aligns its own buffers to 64 bytes
            arguments.append(tvm.runtime.tensor(np.ascontiguousarray(array)))
        for parameter in self.kernel.params[len(inputs) :]:
            shape = tuple(value_of(extent, symbols) for extent in parameter.shape)
            arguments.append(tvm.runtime.tensor(_poison(shape, str(parameter.dtype))))
        self.main(*arguments)
        results = [*arguments[:in_place], *arguments[len(inputs) :]]
        arrays = tuple(result.numpy() for result in results)
        return arrays[0] if len(arrays) == 1 else arrays


def _main(module: ir.IRModule, target: Target) -> Callable[..., object]:
    """Return the compiled function `main`, which takes tensors."""
    if target.device == "metal":
        return MetalKernel(module, target)
    if target.architecture != aarch64.ARCHITECTURE or target.architecture == platform.machine():
        return tvm.compile(module, target=tvm.target.Target(target.tvm))["main"]
    library = aarch64.kernels().build(module, target)

    def main(*tensors: Any) -> None:
        after = aarch64.kernels().run(library, [tensor.numpy() for tensor in tensors])
        for tensor, array in zip(tensors, after, strict=True):
            tensor.copyfrom(array)

    return main


class LaunchedKernel:
    """A scheduled kernel on the OpenCL device, or on the stand-in for CUDA, called as a function
    compiled by TVM is."""

    def __init__(self, function: PrimFunc, target: Target) -> None:
        module = ir.IRModule({"main": function.without_attr("global_symbol")})
        module = wait_for_launches(split_launches(store_halves(module, target), target), target)
        self.module, self.runtime = module, target.runtime
        if self.runtime == "opencl":
            self.source = opencl_source(module, target)
            self.image = self.source.encode()
            return
        self.source = cuda_source(module, target)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, target.library)
            cuda_device.compile_here(self.source, target, output)
            self.image = output.read_bytes()

    def load(self, launches: Launches) -> LaunchDevice:
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.image)
            file.flush()
            image, programs = Path(file.name), {"main": launches}
            if self.runtime == "opencl":
                return OpenCLDevice(image, programs)
            return CudaDevice(image, programs, cuda_device.open_here())

    def __call__(self, *arguments: Any) -> None:
        device = self.load(kernel_launches(self.module, "main", [a.shape for a in arguments]))
        arrays = [argument.numpy() for argument in arguments]
        bound = [device.tensor(array) for array in arrays]
        device.call("main", bound)
        for argument, array, memory in zip(arguments, arrays, bound, strict=True):
            device.read(memory, array)
            argument.copyfrom(array)


class MetalKernel:
    """A scheduled kernel on the stand-in for Metal, called as a function compiled by TVM is."""

    def __init__(self, module: ir.IRModule, target: Target) -> None:
        metal_device.load_stand_in()
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, target.library)
            build_library(module, target, library)
            self.function = load_function(library, "main", 1)

    def __call__(self, *arguments: Any) -> None:
        device = tvm.runtime.device("metal")
        tensors = [argument.copyto(device) for argument in arguments]
        try:
            self.function(*tensors)
            for argument, tensor in zip(arguments, tensors, strict=True):
                tensor.copyto(argument)
        finally:
            metal_device.reset()  # in case it failed


def _poison(shape: tuple[int, ...], dtype: str) -> Array:
    """Return an output with numbers that it must not keep: NaN, or the smallest integer."""
    kind = np.dtype(dtype)
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).min, kind)


def value_of(extent: Any, symbols: dict[str, int]) -> int:
    """Evaluate an extent, which may be an expression of the symbols bound so far."""
    known = structural_map(extent, (tirx.Var, lambda v: tirx.const(symbols[v.name], "int64")))
    return int(Analyzer().simplify(known))
