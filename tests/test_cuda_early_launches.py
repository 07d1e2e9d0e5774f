"""Launches that begin before the one before them has ended, on the stand-in for an NVIDIA GPU
(`cuda_device.py`): it finds what is used before the wait."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_device import H100, compile_here, open_here
from metal_device import needs_gxx
from test_cuda_stand_in import image as image  # a fixture

from osscompile.codegen.cuda import PRELUDE
from osscompile.runtime.devices.cuda import CudaDevice
from osscompile.runtime.devices.program import Launch, Launches
from osscompile.runtime.errors import ArtifactError

pytestmark = needs_gxx

WAIT, LET_BEGIN = (
    f'asm volatile("griddepcontrol.{name};" ::: "memory");'
    for name in ("wait", "launch_dependents")
)
A, B, C = (("bound", i) for i in range(3))


def run_chain(image: Path, *bodies: str, dependent: bool = True) -> list[int]:
    """Run kernels one after the other, each with bodies that may use int32 a, b and c of 64, and
    return a[0], b[0] and c[0]. They begin as 0; each kernel has two warps and 1,024 bytes of
    `shared`."""
    head = 'extern "C" __global__ void __launch_bounds__(64) f{}(int* a, int* b, int* c) {{\n'
    head += "  extern __shared__ __align__(1024) unsigned shared[];\n  int i = threadIdx.x;\n"
    kernels = (f"{head.format(i)}{body}\n}}\n" for i, body in enumerate(bodies))
    compile_here(PRELUDE + "".join(kernels), H100, image)
    launches = [
        Launch(f"f{i}", (A, B, C), (2,), (64,), 1024, dependent=dependent and i > 0)
        for i in range(len(bodies))
    ]
    device = CudaDevice(image, {"f": Launches((), tuple(launches))}, open_here())
    bound = [device.tensor(np.zeros(64, np.int32)) for _ in range(3)]
    device.call("f", bound)
    found = [np.zeros(64, np.int32) for _ in bound]
    for memory, array in zip(bound, found, strict=True):
        device.read(memory, array)
    return [int(array[0]) for array in found]


def test_launch_that_waits_before_it_reads_and_writes(image: Path) -> None:
    read_early = f"  int x = c[i]; {WAIT} {LET_BEGIN} b[i] = a[i] + x + 1;"
    assert run_chain(image, "  a[i] = 7;", read_early) == [7, 8, 0]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (f"  int x = a[i]; {WAIT} b[i] = x;", "uses what the launch before writes"),
        (f"  if (i) {WAIT} b[i] = a[i];", "uses what the launch before writes"),
        (f"  b[i] = 1; {WAIT}", "writes before it has waited"),
        ("  if (c[i]) b[i] = 1;", "never waits"),
    ],
)
def test_launch_that_does_not_wait(image: Path, body: str, fault: str) -> None:
    """An ordinary launch need not."""
    with pytest.raises(ArtifactError, match=fault):
        run_chain(image, "  a[i] = 7;", body)
    run_chain(image, "  a[i] = 7;", body, dependent=False)


def test_copy_that_starts_before_the_wait(image: Path) -> None:
    """It may run at once, whenever it is waited for."""
    start = "copy_16(shared + i * 4, {}); copy_commit();"
    rest = "copy_wait<0>(); b[i] = shared[i * 4];"
    first, early = "  a[i] = 7;", f"  {start} {WAIT} {rest}"
    assert run_chain(image, first, early.format("c")) == [7, 0, 0]
    assert run_chain(image, first, f"  {WAIT} {start} {rest}".format("a")) == [7, 7, 0]
    with pytest.raises(ArtifactError, match="uses what the launch before writes"):
        run_chain(image, first, early.format("a"))


def test_threads_that_wait_for_one_that_waited(image: Path) -> None:
    body = f"  if (i == 0) {{ {WAIT} }}\nBARRIER  b[63 - i] = a[i];"
    assert run_chain(image, "  a[i] = 7;", body.replace("BARRIER", "  __syncthreads();\n"))[1] == 7
    with pytest.raises(ArtifactError, match="has not waited for it"):
        run_chain(image, "  a[i] = 7;", body.replace("BARRIER", ""))


def test_what_was_written_two_launches_before(image: Path) -> None:
    """It is there if the launch between waited before it let the next one begin."""
    first, last = "  a[i] = 7;", f"  int x = a[i]; {WAIT} c[i] = x;"
    assert run_chain(image, first, f"  {WAIT} {LET_BEGIN} b[i] = 1;", last) == [7, 1, 7]
    with pytest.raises(ArtifactError, match="uses what the launch before writes"):
        run_chain(image, first, f"  {LET_BEGIN} {WAIT} b[i] = 1;", last)
