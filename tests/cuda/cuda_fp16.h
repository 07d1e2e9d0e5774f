// The part of this header of CUDA that TVM's sources use.
#ifndef CUDA_FP16
#define CUDA_FP16
using half = _Float16;
using __half = half;
struct __half2;
inline bool __hgt(half x, half y) { return x > y; }
inline bool __hlt(half x, half y) { return x < y; }
#endif
