// Operations that the lanes of a warp do together: the answers to their requests.
#ifndef WARP
#define WARP

#include <cstring>

#include "nvcc.h"
#include "warpgroup.h"

#undef blockIdx
#undef threadIdx

namespace cuda {

constexpr unsigned kNoValue = 0x7fc00bad;  // NaN: the value of lanes that give none
constexpr unsigned kLanes = 32;

// mma.m16n8k32 of signed bytes. NVIDIA's description of PTX says what each lane holds: "Matrix
// Fragments for mma.m16n8k32".
inline void Multiply(Request* const* lanes) {
  signed char a[16][32], b[8][32];  // b: by columns
  auto byte = [](unsigned word, int i) { return (signed char)(word >> 8 * i); };
  for (int lane = 0; lane < int(kLanes); ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 16; ++i) {
      int row = (0 <= i && i < 4) || (8 <= i && i < 12) ? group : group + 8;
      int column = in_group * 4 + (i & 3) + (i >= 8 ? 16 : 0);
      a[row][column] = byte(lanes[lane]->a[i / 4], i % 4);
    }
    for (int i = 0; i < 8; ++i) {
      int row = in_group * 4 + (i & 3) + (i >= 4 ? 16 : 0);
      b[group][row] = byte(lanes[lane]->b[i / 4], i % 4);
    }
  }
  for (int lane = 0; lane < int(kLanes); ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
      for (int k = 0; k < 32; ++k) lanes[lane]->c[i] += a[row][k] * b[column][k];
    }
  }
}

// mma.m16n8k8 of the upper 19 bits of floats; lanes hold "Matrix Fragments for mma.m16n8k8".
inline void MultiplyTf32(Request* const* lanes) {
  float a[16][8], b[8][8];  // b: by columns
  auto number = [](unsigned bits) { return __builtin_bit_cast(float, bits & 0xffffe000); };
  for (int lane = 0; lane < int(kLanes); ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? in_group : in_group + 4;
      a[row][column] = number(lanes[lane]->a[i]);
    }
    for (int i = 0; i < 2; ++i) b[group][in_group + i * 4] = number(lanes[lane]->b[i]);
  }
  for (int lane = 0; lane < int(kLanes); ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
      float sum = __builtin_bit_cast(float, lanes[lane]->c[i]);
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[column][k];
      lanes[lane]->c[i] = __builtin_bit_cast(int, sum);
    }
  }
}

// mma.m16n8k16 of halves or bfloat16; lanes hold "Matrix Fragments for mma.m16n8k16 with floating
// point type".
inline void Multiply16(Request* const* lanes, float (*to_float)(unsigned short)) {
  float a[16][16], b[8][16];  // b: by columns
  for (int lane = 0; lane < int(kLanes); ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      int row = i % 4 < 2 ? group : group + 8, column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = to_float(lanes[lane]->a[i / 2] >> i % 2 * 16 & 0xffff);
    }
    for (int i = 0; i < 4; ++i) {
      int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      b[group][row] = to_float(lanes[lane]->b[i / 2] >> i % 2 * 16 & 0xffff);
    }
  }
  for (int lane = 0; lane < int(kLanes); ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
      float sum = __builtin_bit_cast(float, lanes[lane]->c[i]);
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      lanes[lane]->c[i] = __builtin_bit_cast(int, sum);
    }
  }
}

// ldmatrix of four 8 x 8 matrices of halves, transposed: lanes 8 m to 8 m + 7 name the rows of matrix
// m, and every lane gets two neighbours of a column of each, row 2 (lane % 4) in the lower half.
inline void LoadMatrices(Request* const* lanes) {
  unsigned short number[4][8][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) memcpy(number[lane / 8][lane % 8], lanes[lane]->row, 16);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    unsigned column = lane / 4, row = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      lanes[lane]->a[m] = number[m][row][column] | unsigned(number[m][row + 1][column]) << 16;
    }
  }
}

// Whether this is work of the whole warp.
inline bool IsWork(const Request& request) {
  return Request::kMultiply <= request.kind && request.kind <= Request::kLoadMatrices;
}

inline void Work(Request::Kind kind, Request* const* lanes) {
  if (kind == Request::kMultiply) Multiply(lanes);
  if (kind == Request::kMultiplyTf32) MultiplyTf32(lanes);
  auto half = [](unsigned short bits) { return float(__builtin_bit_cast(_Float16, bits)); };
  auto bf16 = [](unsigned short bits) { return float(FromBf16(bits)); };
  if (kind == Request::kMultiplyF16) Multiply16(lanes, half);
  if (kind == Request::kMultiplyBf16) Multiply16(lanes, bf16);
  if (kind == Request::kLoadMatrices) LoadMatrices(lanes);
}

// Returns the lane whose value one gets; beyond its part of the warp a lane gets its own.
inline unsigned Source(const Request& request, unsigned lane) {
  unsigned width = unsigned(request.width), first = lane / width * width, at = unsigned(request.lane);
  if (request.kind == Request::kShuffle) return first + at % width;
  if (request.kind == Request::kShuffleXor) return lane ^ at;
  return lane - first + at < width ? lane + at : lane;
}

// Whether all lanes that the mask names have come with the same mask, so that their values are known.
inline bool HaveCome(Request* const* lanes, const Request& request) {
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!(request.mask >> i & 1)) continue;
    if (!lanes[i] || lanes[i]->kind != request.kind || lanes[i]->mask != request.mask) return false;
  }
  return true;
}

inline unsigned Exchange(void* const* requests, unsigned num_lanes) {
  Request* lanes[kLanes] = {};
  unsigned given[kLanes], answered = 0, active = 0, waited = 0;
  for (unsigned i = 0; i < num_lanes; ++i) {
    lanes[i] = static_cast<Request*>(requests[i]);
    given[i] = lanes[i] ? lanes[i]->value : kNoValue;
    if (lanes[i] && lanes[i]->kind == Request::kActiveMask) active |= 1u << i;
    if (lanes[i] && lanes[i]->kind == Request::kWaitLaunch) waited |= 1u << i;
    if (!lanes[i] || lanes[i]->kind != Request::kWaitProducts) continue;
    if (Waited(unsigned(lanes[i]->lane))) waited |= 1u << i;
    lanes[i] = nullptr;
  }
  for (unsigned i = 0; i < num_lanes; ++i) {
    if (!lanes[i] || (active | waited | answered) >> i & 1) continue;
    if ((lanes[i]->mask >> i & 1) && HaveCome(lanes, *lanes[i])) answered |= lanes[i]->mask;
  }
  for (unsigned i = 0; i < num_lanes; ++i) {
    if (active >> i & 1) lanes[i]->mask = active;
    if (!(answered >> i & 1) || IsWork(*lanes[i])) continue;
    unsigned source = Source(*lanes[i], i);
    lanes[i]->value = lanes[i]->mask >> source & 1 ? given[source] : kNoValue;
  }
  if (answered) Work(lanes[__builtin_ctz(answered)]->kind, lanes);
  return answered | active | waited;
}

}  // namespace cuda

#endif
