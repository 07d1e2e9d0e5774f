"""Functions that CUDA sources begin with: instructions of PTX that schedules call by name."""

from ..schedules.gpu import launch_before, mma, mma_bf16, mma_f16, tf32, wgmma
from ..schedules.gpu.packed_bytes import ADD_DOT, DOT, SELECT
from ..schedules.gpu.room import ROOM
from ..schedules.gpu.top_lanes import GREATEST, LEAST


def _mma(name: str, instruction: str, number: str, register: str) -> str:
    """Return the product of a warp's matrices, added to four sums of a thread."""
    return f"""\
static __device__ void {name}({number}* c0, {number}* c1, {number}* c2, {number}* c3, unsigned a0,
                              unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {{
  asm("mma.sync.aligned.{instruction} "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+{register}"(*c0), "+{register}"(*c1), "+{register}"(*c2), "+{register}"(*c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}"""


_ANY = f"""\
static __device__ int {DOT}(unsigned a, unsigned b) {{ return __dp4a(int(a), int(b), 0); }}
static __device__ int {ADD_DOT}(unsigned a, unsigned b, int c) {{
  return __dp4a(int(a), int(b), c);
}}
{_mma(mma.MMA, "m16n8k32.row.col.s32.s8.s8.s32", "int", "r")}
{_mma(tf32.MMA, "m16n8k8.row.col.f32.tf32.tf32.f32", "float", "f")}
static __device__ unsigned {SELECT}(unsigned low, unsigned high, unsigned selectors) {{
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
}}
static __device__ void {ROOM}(int) {{}}
static __device__ int {GREATEST}(int x) {{ return __reduce_max_sync(0xffffffffu, x); }}
static __device__ int {LEAST}(int x) {{ return __reduce_min_sync(0xffffffffu, x); }}

"""

# Instructions of Hopper: the wait for the launch before, and products by its matrix units, whose
# operands are many. What touches sums that are not there yet names them as operands, so that no
# compiler moves it before the product.
_HOPPER = f"""\
static __device__ void {launch_before.WAIT}() {{
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}}
static __device__ void {wgmma.BEGIN}() {{
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}}
static __device__ void {wgmma.COMMIT}() {{
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}}
static __device__ void {wgmma.WAIT}() {{
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}}
static __device__ void {mma_bf16.MMA}(float* c, const unsigned* a, const unsigned* b) {{
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}
static __device__ void {mma_bf16.LEAVE}(float* to, float sum) {{ *to = sum; }}
static __device__ unsigned {wgmma.MULTIPLY_PAIRS}(unsigned a, unsigned b) {{
  unsigned product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}}
static __device__ unsigned {wgmma.PACK}(float low, float high) {{
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}}
static __device__ unsigned shared_address(const void* memory) {{
  return unsigned(__cvta_generic_to_shared(memory));
}}
{_mma(mma_f16.MMA, "m16n8k16.row.col.f32.f16.f16.f32", "float", "f")}
static __device__ void {mma_f16.LOAD}(unsigned* d, const void* memory, int word) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(memory) + word * 4) : "memory");
}}
static __device__ unsigned {mma_f16.PACK}(float low, float high) {{
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}}
static __device__ float {mma_f16.EXP2}(float x) {{
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}}
// rows of 128 bytes, eight of which lie together, with pieces that change places
static __device__ unsigned long long {wgmma.DESCRIBE}(const void* memory) {{
  unsigned long long start = (shared_address(memory) & 0x3ffff) >> 4;
  return start | 1ull << 16 | 64ull << 32 | 1ull << 62;
}}
static __device__ void {wgmma.COPY}(void* to, const void* from) {{
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"(shared_address(to)), "l"(from) : "memory");
}}
static __device__ void {wgmma.COPY_COMMIT}() {{
  asm volatile("cp.async.commit_group;" ::: "memory");
}}
template <int later> static __device__ void {wgmma.COPY_WAIT}() {{
  asm volatile("cp.async.wait_group %0;" :: "n"(later) : "memory");
}}
static __device__ void {wgmma.SHOW}() {{
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}}
"""


def _multiply(rows: int) -> str:
    """Return the product for so many rows of activations, and what waits for its sums."""
    count = rows // 2
    names = [f"%{i}" for i in range(count + 5)]
    sums, weights = ", ".join(names[:count]), ", ".join(names[count : count + 4])
    operands = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    words = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""\
static __device__ void {wgmma.MULTIPLY[rows]}(float* c, const unsigned* a, unsigned long long b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 "
               "{{{sums}}}, {{{weights}}}, {names[-1]}, 1, 1, 1, 0;"
               : {operands}
               : {words}, "l"(b));
}}
static __device__ void {wgmma.FINISH[rows]}(float* c) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" : {operands} :: "memory");
}}
"""


PRELUDE = _ANY + _HOPPER + "".join(map(_multiply, wgmma.MULTIPLY)) + "\n"
