"""How fast a device reads its own memory, with a kernel that its driver compiles."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..devices.launch_devices import LAUNCH_DEVICES
from ..devices.program import Launch, Launches

READ_BYTES = 1 << 30  # from memory, far beyond what a cache holds of it
THREADS = 256  # of a group
LOAD_BYTES = 16  # neighbouring threads load neighbouring bytes
STEPS = 64  # loads of a thread
TOGETHER = 4  # of them, so that they hide each other's latency
PIECE_BYTES = THREADS * LOAD_BYTES * STEPS  # that a group reads from end to end
CHUNKS = 64  # of the data, all with the same contents
TRIALS = 3  # the best counts: a limit is what is possible


class DeviceReader:
    """Reads `num_bytes` a call with all of the device, and does nothing else with them.

    `runtime`: of the device's artifacts, `opened`: the device. Raises OsscompileError without room.
    """

    def __init__(self, runtime: str, opened: Any) -> None:
        self.num_bytes = READ_BYTES
        groups = READ_BYTES // PIECE_BYTES
        arguments = (("bound", 0), ("bound", 1), ("int32", STEPS))
        launches = Launches((), (Launch("read_memory", arguments, (groups,), (THREADS,)),))
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(SOURCES[runtime])
            file.flush()
            self._device = LAUNCH_DEVICES[runtime](Path(file.name), {"read": launches}, opened)
        data = self._device.zeros((CHUNKS, READ_BYTES // CHUNKS // 4), "uint32")
        rng = np.random.default_rng(0)  # zeros would take less power, perhaps less time
        chunk = rng.integers(0, 1 << 32, data.shape[1], dtype=np.uint32)
        self._device.write(data, np.broadcast_to(chunk, data.shape))
        sums = self._device.zeros((1, groups * THREADS), "uint32")
        self._bound = [self._device.tensor(data), self._device.tensor(sums)]
        self.best_seconds = min(self.seconds() for _ in range(TRIALS))

    def seconds(self) -> float:
        """By the device's clock."""
        return self._device.seconds("read", [self._bound])


def _opencl() -> str:
    loads = [f"data[(step + {i}) * width]" for i in range(TOGETHER)]
    return f"""\
/* Every thread adds up `steps` vectors, {TOGETHER} at once. */
__kernel void read_memory(
    __global const uint4 *restrict data, __global uint *restrict sums, int steps) {{
  size_t width = get_local_size(0);
  uint4 sum = 0;
  data += get_group_id(0) * steps * width + get_local_id(0);
  for (int step = 0; step < steps; step += {TOGETHER})
    sum += {" + ".join(loads)};
  sums[get_global_id(0)] = sum.x + sum.y + sum.z + sum.w;
}}
"""


def _ptx() -> str:
    """The same, for any NVIDIA GPU since compute capability 8.0."""
    loads, adds = "", ""
    for i in range(0, 4 * TOGETHER, 4):
        words = [f"word{n}" for n in range(i, i + 4)]
        loads += f"  ld.global.v4.u32 {{{', '.join(words)}}}, [address];\n"
        loads += "  add.u64 address, address, stride;\n"
        adds += "".join(f"  add.u32 sum, sum, {word};\n" for word in words)
    return f"""\
.version 7.8
.target sm_80
.address_size 64

.visible .entry read_memory(.param .u64 data, .param .u64 sums, .param .u32 count)
{{
  .reg .pred more;
  .reg .b32 steps, width, thread, group, index, sum, word<{4 * TOGETHER}>;
  .reg .b64 address, out, stride, offset;

  ld.param.u64 address, [data];
  ld.param.u64 out, [sums];
  ld.param.u32 steps, [count];
  cvta.to.global.u64 address, address;
  cvta.to.global.u64 out, out;
  mov.u32 width, %ntid.x;
  mov.u32 thread, %tid.x;
  mov.u32 group, %ctaid.x;

  mad.lo.u32 index, group, width, thread;
  mul.wide.u32 offset, index, 4;
  add.u64 out, out, offset;

  mul.lo.u32 index, group, steps;
  mad.lo.u32 index, index, width, thread;
  mul.wide.u32 offset, index, {LOAD_BYTES};
  add.u64 address, address, offset;
  mul.wide.u32 stride, width, {LOAD_BYTES};
  mov.u32 sum, 0;

next:
{loads}{adds}  sub.u32 steps, steps, {TOGETHER};
  setp.ne.u32 more, steps, 0;
  @more bra next;

  st.global.u32 [out], sum;
  ret;
}}
"""


SOURCES = {"opencl": _opencl(), "cuda": _ptx()}  # by the runtime of an artifact
