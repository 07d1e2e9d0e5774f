// What threads start and do not wait for at once: copies into shared memory, and products that the
// threads of a warpgroup compute together. Both happen as late as they may, at the wait for them, and
// until then leave NaN where they will write: who reads too early, or writes too early what they read,
// gets a wrong result. Blocks have one axis.
#ifndef WARPGROUP
#define WARPGROUP

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "nvcc.h"

#undef blockIdx
#undef threadIdx

namespace cuda {

constexpr unsigned kWarpgroup = 128;  // threads
constexpr int kProductRows = 64, kProductInputs = 16;

struct Product {  // a thread's part of one
  unsigned weights[4];
  unsigned long long described;
};

struct Copy {
  char* to;
  const char* from;
};

struct Thread {
  std::vector<Product> products;  // that are in no group yet
  std::deque<std::vector<Product>> groups;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<float*> sums;  // of products that are not done
  std::vector<float> values;
  bool begun = false, hidden = false;  // the matrix units do not see what was copied
  int later = -1;                      // groups that a wait leaves, or -1 without a wait
};

struct Block {
  std::vector<Thread> threads;
  char* shared = nullptr;  // memory that the launch adds
};
inline Block block;

inline float FromBf16(unsigned bits) { return __builtin_bit_cast(float, bits << 16); }

// Returns what is wrong, or null.
inline const char* Start(const Asynchronous& started, unsigned number) {
  if (block.threads.size() <= number) block.threads.resize((number / kWarpgroup + 1) * kWarpgroup);
  Thread& thread = block.threads[number];
  switch (started.kind) {
    case Asynchronous::kBegin:
      thread.begun = true;
      break;
    case Asynchronous::kProduct:
      if (!thread.begun) return "a product of words that may not be there yet: no fence before it";
      if (thread.hidden) return "a product of copies that the matrix units cannot see";
      if (thread.sums.empty()) {
        thread.sums.assign(started.sums, started.sums + started.count);
        thread.values.clear();
        for (float* sum : thread.sums) thread.values.push_back(*sum), *sum = __builtin_nanf("");
      }
      for (int i = 0; i < started.count; ++i) {
        if (started.sums[i] != thread.sums[i]) return "products with different sums at once";
      }
      thread.products.push_back({{}, started.described});
      memcpy(thread.products.back().weights, started.weights, sizeof started.weights);
      break;
    case Asynchronous::kCommit:
      thread.groups.push_back(std::move(thread.products));
      thread.products.clear();
      thread.begun = false;
      break;
    case Asynchronous::kWait:
      thread.later = started.count;
      break;
    case Asynchronous::kCopy:
      thread.copies.push_back({static_cast<char*>(started.to), static_cast<const char*>(started.from)});
      if (size_t(started.to) % 16 || size_t(started.from) % 16) return "a copy that is not aligned";
      *static_cast<const volatile char*>(started.from);  // it must be there when the copy starts
      memset(started.to, 0xff, 16);
      break;
    case Asynchronous::kCopyCommit:
      thread.copy_groups.push_back(std::move(thread.copies));
      thread.copies.clear();
      break;
    case Asynchronous::kCopyWait:
      while (int(thread.copy_groups.size()) > started.count) {
        for (const Copy& copy : thread.copy_groups.front()) memcpy(copy.to, copy.from, 16);
        thread.hidden |= !thread.copy_groups.front().empty();
        thread.copy_groups.pop_front();
      }
      break;
    case Asynchronous::kShow:
      thread.hidden = false;
      break;
  }
  return nullptr;
}

// Returns number k of row n of the second factor: rows of 128 bytes, of which eight lie together, and
// pieces of 16 bytes that change places by bits 7 to 9 of the address.
inline float Second(unsigned long long described, int n, int k) {
  unsigned stride = unsigned(described >> 32 & 0x3fff) << 4;
  unsigned at = (unsigned(described & 0x3fff) << 4) + n / 8 * stride + n % 8 * 128 + 2 * k;
  at ^= (at >> 7 & 7) << 4;
  unsigned short bits;
  memcpy(&bits, block.shared + at - kSharedStart, 2);
  return FromBf16(bits);
}

// wgmma.m64nNk16; threads hold what NVIDIA's description of PTX says ("Register Fragments").
inline void Multiply(Thread* threads, size_t which) {
  static float a[kProductRows][kProductInputs], b[256][kProductInputs];
  int rows = int(threads[0].sums.size()) * 2;
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    const unsigned* words = threads[t].groups.front()[which].weights;
    for (int i = 0; i < 4; ++i) {
      int row = int(t / 32 * 16 + t % 32 / 4) + i % 2 * 8, k = i / 2 * 8 + int(t % 4) * 2;
      a[row][k] = FromBf16(words[i] & 0xffff);
      a[row][k + 1] = FromBf16(words[i] >> 16);
    }
  }
  unsigned long long described = threads[0].groups.front()[which].described;
  for (int n = 0; n < rows; ++n) {
    for (int k = 0; k < kProductInputs; ++k) b[n][k] = Second(described, n, k);
  }
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    for (int i = 0; i < rows / 2; ++i) {
      int row = int(t / 32 * 16 + t % 32 / 4) + i / 2 % 2 * 8, n = i / 4 * 8 + int(t % 4) * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < kProductInputs; ++k) sum += a[row][k] * b[n][k];
      threads[t].values[i] += sum;
    }
  }
}

// Returns whether the wait of a thread is over: all of its warpgroup wait, and their products are done.
inline bool Waited(unsigned number) {
  Thread* threads = &block.threads[number / kWarpgroup * kWarpgroup];
  int later = block.threads[number].later;
  if (later < 0) return true;  // another lane has found them done
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    if (threads[t].later != later || threads[t].groups.size() != threads[0].groups.size()) return false;
    if (!threads[t].products.empty()) return false;
  }
  while (int(threads[0].groups.size()) > later) {
    for (size_t i = 0; i < threads[0].groups.front().size(); ++i) Multiply(threads, i);
    for (unsigned t = 0; t < kWarpgroup; ++t) threads[t].groups.pop_front();
  }
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    threads[t].later = -1;
    if (!threads[t].groups.empty()) continue;
    for (size_t i = 0; i < threads[t].sums.size(); ++i) *threads[t].sums[i] = threads[t].values[i];
    threads[t].sums.clear();
  }
  return true;
}

// Whether something was started and not waited for.
inline bool LeftBehind() {
  for (const Thread& thread : block.threads) {
    if (!thread.groups.empty() || !thread.products.empty() || !thread.sums.empty()) return true;
  }
  return false;
}

}  // namespace cuda

#endif
