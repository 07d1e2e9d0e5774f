// The part of CUDA C++ that our kernels use, as C++17 for g++, and no more: code that CUDA rejects
// must not compile here either. nvcc knows all this without an include. Threads of a block take turns
// (see driver.cc). `cuda_device.py` rewrites `__shared__`, so that they see each other's memory.
#ifndef NVCC
#define NVCC

#include <cstddef>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
#define CUDA_VECTORS(name, type)                                                \
  struct alignas(2 * sizeof(type)) name##2 {                                    \
    type x, y;                                                                  \
  };                                                                            \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 {            \
    type x, y, z, w;                                                            \
  };                                                                            \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_VECTORS(int, int)
CUDA_VECTORS(uint, unsigned)
CUDA_VECTORS(float, float)
CUDA_VECTORS(ushort, unsigned short)
CUDA_VECTORS(longlong, long long)
#undef CUDA_VECTORS

namespace cuda {

struct Position {  // as in fibres.h
  uint3 group, thread;
};

// A lane's request to its warp, with the answer that driver.cc gives.
struct Request {
  enum Kind {
    kActiveMask, kShuffleDown, kShuffleXor, kShuffle, kMultiply, kMultiplyTf32, kMultiplyF16,
    kMultiplyBf16, kLoadMatrices, kWaitLaunch, kWaitProducts
  } kind;
  unsigned mask, value;
  int lane, width;      // of a shuffle: the distance, what to change, or the lane
  unsigned a[4], b[2];  // factors of a product; a: what matrices a lane has loaded
  int c[4];             // sums of a product, or the bits of floats
  void* fibre;          // that asks; set by driver.cc
  const void* row;      // of a matrix
};

// What a thread starts and does not wait for, and what it says about that; see warpgroup.h.
struct Asynchronous {
  enum Kind { kBegin, kProduct, kCommit, kWait, kCopy, kCopyCommit, kCopyWait, kShow } kind;
  int count = 0;  // of a product's sums, or of the groups that a wait leaves
  float** sums = nullptr;
  unsigned weights[4] = {};
  unsigned long long described = 0;
  void* to = nullptr;
  const void* from = nullptr;
};

constexpr unsigned kSharedStart = 1024;  // address in shared memory of what a launch adds

}  // namespace cuda

extern "C" {  // set by driver.cc
void (*cuda_barrier)();
void (*cuda_ask)(void* request);
void (*cuda_let_next_begin)();
void (*cuda_start)(const cuda::Asynchronous* started);
char* const* cuda_added;  // shared memory that the launch adds
void (*cuda_declare)(void* shared_memory, std::size_t size);
const cuda::Position* const* cuda_position;
}

#define blockIdx (*cuda_position)->group
#define threadIdx (*cuda_position)->thread

inline void __syncthreads() { cuda_barrier(); }

inline unsigned __activemask() {
  cuda::Request request{cuda::Request::kActiveMask};
  cuda_ask(&request);
  return request.mask;
}

namespace cuda {
template <class T> T shuffle(Request::Kind kind, unsigned mask, T x, int lane, int width) {
  Request request{kind, mask, __builtin_bit_cast(unsigned, x), lane, width};
  cuda_ask(&request);
  return __builtin_bit_cast(T, request.value);
}
}  // namespace cuda
template <class T> T __shfl_sync(unsigned mask, T x, int lane, int width) {
  return cuda::shuffle(cuda::Request::kShuffle, mask, x, lane, width);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width) {
  return cuda::shuffle(cuda::Request::kShuffleDown, mask, x, int(delta), width);
}

template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes, int width) {
  return cuda::shuffle(cuda::Request::kShuffleXor, mask, x, lanes, width);
}

inline int __reduce_max_sync(unsigned mask, int x) {
  for (int i = 16; i; i /= 2) {
    int other = __shfl_xor_sync(mask, x, i, 32);
    x = other > x ? other : x;
  }
  return x;
}
inline int __reduce_min_sync(unsigned mask, int x) { return ~__reduce_max_sync(mask, ~x); }

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
  return c;
}

// Instructions of PTX, as functions of their names.
inline void griddepcontrol_wait() {
  cuda::Request request{cuda::Request::kWaitLaunch};
  cuda_ask(&request);
}
inline void griddepcontrol_launch_dependents() { cuda_let_next_begin(); }

inline void prmt_b32(unsigned& d, unsigned a, unsigned b, unsigned selectors) {
  unsigned long long bytes = a | (unsigned long long)b << 32;
  d = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned selector = selectors >> 4 * i;
    unsigned byte = bytes >> (selector & 7) * 8 & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    d |= byte << 8 * i;
  }
}

inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(
    int& d0, int& d1, int& d2, int& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
    unsigned b0, unsigned b1, int c0, int c1, int c2, int c3) {
  cuda::Request request{cuda::Request::kMultiply, ~0u, 0, 0, 0, {a0, a1, a2, a3}, {b0, b1},
                        {c0, c1, c2, c3}};
  cuda_ask(&request);
  d0 = request.c[0];
  d1 = request.c[1];
  d2 = request.c[2];
  d3 = request.c[3];
}

namespace cuda {
inline void multiply_floats(Request::Kind kind, float* const (&d)[4], const unsigned (&a)[4],
                            const unsigned (&b)[2], const float (&c)[4]) {
  Request request{kind, ~0u, 0, 0, 0, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {}};
  for (int i = 0; i < 4; ++i) request.c[i] = __builtin_bit_cast(int, c[i]);
  cuda_ask(&request);
  for (int i = 0; i < 4; ++i) *d[i] = __builtin_bit_cast(float, request.c[i]);
}
}  // namespace cuda
#define CUDA_MMA(name, kind)                                                                   \
  inline void name(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1,       \
                   unsigned a2, unsigned a3, unsigned b0, unsigned b1, float c0, float c1,     \
                   float c2, float c3) {                                                       \
    cuda::multiply_floats(cuda::Request::kind, {&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, \
                          {c0, c1, c2, c3});                                                   \
  }
CUDA_MMA(mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32, kMultiplyTf32)
CUDA_MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, kMultiplyF16)
CUDA_MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, kMultiplyBf16)
#undef CUDA_MMA

inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(unsigned& d0, unsigned& d1, unsigned& d2,
                                                           unsigned& d3, unsigned row) {
  cuda::Request request{cuda::Request::kLoadMatrices, ~0u};
  request.row = *cuda_added + row - cuda::kSharedStart;
  if (row % 16) __builtin_trap();
  cuda_ask(&request);
  d0 = request.a[0];
  d1 = request.a[1];
  d2 = request.a[2];
  d3 = request.a[3];
}

inline unsigned long __cvta_generic_to_shared(const void* memory) {
  return static_cast<const char*>(memory) - *cuda_added + cuda::kSharedStart;
}

namespace cuda {

inline void start(Asynchronous::Kind kind, int count = 0) {
  Asynchronous started{kind, count};
  cuda_start(&started);
}

// Takes the operands of a product one after the other.
struct Operands {
  float* sums[128];
  Asynchronous started{Asynchronous::kProduct};
  int num_weights = 0, num_flags = 0, flags[4] = {};

  void take(float& sum) { sums[started.count++] = &sum; }
  void take(unsigned word) { started.weights[num_weights++] = word; }
  void take(unsigned long long described) { started.described = described; }
  void take(int flag) { flags[num_flags++] = flag; }
};

template <class... T> void multiply(T&&... operands) {
  Operands all;
  (all.take(operands), ...);
  all.started.sums = all.sums;
  bool adds = all.flags[0] == 1 && all.flags[1] == 1 && all.flags[2] == 1 && all.flags[3] == 0;
  if (!adds || all.num_weights != 4) __builtin_trap();
  cuda_start(&all.started);
}

}  // namespace cuda

#define CUDA_WGMMA(name, count)                                      \
  template <class... T> void name(T&&... operands) {                 \
    static_assert(sizeof...(T) == count / 2 + 4 + 1 + 4, "operands"); \
    cuda::multiply(operands...);                                     \
  }
CUDA_WGMMA(wgmma_mma_async_sync_aligned_m64n64k16_f32_bf16_bf16, 64)
CUDA_WGMMA(wgmma_mma_async_sync_aligned_m64n128k16_f32_bf16_bf16, 128)
#undef CUDA_WGMMA
inline void wgmma_fence_sync_aligned() { cuda::start(cuda::Asynchronous::kBegin); }
inline void wgmma_commit_group_sync_aligned() { cuda::start(cuda::Asynchronous::kCommit); }
inline void wgmma_wait_group_sync_aligned(int later) {
  cuda::start(cuda::Asynchronous::kWait, later);
  cuda::Request request{cuda::Request::kWaitProducts};
  request.lane = int(threadIdx.x);
  cuda_ask(&request);
}
inline void cp_async_cg_shared_global(unsigned to, const void* from, int bytes) {
  cuda::Asynchronous started{cuda::Asynchronous::kCopy};
  if (bytes != 16) __builtin_trap();
  started.to = *cuda_added + to - cuda::kSharedStart;
  started.from = from;
  cuda_start(&started);
}
inline void cp_async_commit_group() { cuda::start(cuda::Asynchronous::kCopyCommit); }
inline void cp_async_wait_group(int later) { cuda::start(cuda::Asynchronous::kCopyWait, later); }
inline void fence_proxy_async_shared_cta() { cuda::start(cuda::Asynchronous::kShow); }

namespace cuda {
inline unsigned to_bf16(float x) {
  if (x != x) return 0x7fff;
  unsigned bits = __builtin_bit_cast(unsigned, x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float from_bf16(unsigned bits) { return __builtin_bit_cast(float, bits << 16); }
}  // namespace cuda
inline void mul_rn_bf16x2(unsigned& d, unsigned a, unsigned b) {
  unsigned low = cuda::to_bf16(cuda::from_bf16(a & 0xffff) * cuda::from_bf16(b & 0xffff));
  d = low | cuda::to_bf16(cuda::from_bf16(a >> 16) * cuda::from_bf16(b >> 16)) << 16;
}
inline void cvt_rn_bf16x2_f32(unsigned& d, float high, float low) {
  d = cuda::to_bf16(high) << 16 | cuda::to_bf16(low);
}
inline void cvt_rn_f16x2_f32(unsigned& d, float high, float low) {
  auto bits = [](float x) { return unsigned(__builtin_bit_cast(unsigned short, _Float16(x))); };
  d = bits(high) << 16 | bits(low);
}

// Types must agree, unless CUDA has the overload. Given a number and a NaN, they return the number.
#define CUDA_MIN_MAX(T) \
  inline T min(T x, T y) { return y < x ? y : x; } \
  inline T max(T x, T y) { return x < y ? y : x; }
CUDA_MIN_MAX(int)
CUDA_MIN_MAX(unsigned)
CUDA_MIN_MAX(long)
CUDA_MIN_MAX(long long)
#undef CUDA_MIN_MAX
inline float min(float x, float y) { return __builtin_fminf(x, y); }
inline float max(float x, float y) { return __builtin_fmaxf(x, y); }

extern "C" {
float expf(float);
float fmaf(float, float, float);
float logf(float);
float sqrtf(float);
float fabsf(float);
float nearbyintf(float);
}
// What is too small to be normal is zero, in and out; the last bits are as a GPU has them not.
inline void ex2_approx_ftz_f32(float& d, float x) {
  auto flushed = [](float y) { return __builtin_fabsf(y) < 0x1p-126f ? 0 : y; };
  d = flushed(__builtin_exp2f(flushed(x)));
}

// --- The entry by which driver.cc finds a kernel ----------------------------------------------

namespace cuda {

struct Function {
  void (*run)(void* const* parameters);
  const std::size_t* sizes;  // of the parameters
  int count;
  unsigned max_threads;
};

template <auto kernel> struct Entry;
template <class... A, void (*kernel)(A...)> struct Entry<kernel> {
  static constexpr std::size_t sizes[] = {sizeof(A)..., 0};
  static constexpr int count = sizeof...(A);
  template <std::size_t... I> static void call(void* const* p, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(p[I])...);
  }
  static void run(void* const* parameters) { call(parameters, std::index_sequence_for<A...>()); }
};

}  // namespace cuda

#define CUDA_ENTRY(kernel, max_threads)                                                        \
  extern "C" const cuda::Function entry_##kernel = {                                           \
      cuda::Entry<kernel>::run, cuda::Entry<kernel>::sizes, cuda::Entry<kernel>::count, max_threads};

#endif
