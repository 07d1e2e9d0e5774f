// Kernels for tests of the runtime.

// Writes 2 x ids, one number a thread.
extern "C" __global__ void __launch_bounds__(1024) twice(float* out, const int* ids, long count) {
  long i = blockIdx.x * 2 + threadIdx.x;
  if (i < count) out[i] = 2 * ids[i];
}

// Adds the position, `first` and the cache's number, which it counts up.
extern "C" __global__ void __launch_bounds__(1024) add(float* out, const int* position, float* cache, long n, int first) {
  for (long i = 0; i < n; ++i) out[i] += position[0] + cache[0] + first;
  cache[0] += 1;
}

static __device__ void scale(float* out, const float* x, long count, float factor, int times) {
  long i = long(blockIdx.x) * 10 + threadIdx.x;
  for (volatile int n = 0; n < times && i < count; n = n + 1) out[i] = factor * x[i];
}
extern "C" __global__ void __launch_bounds__(1024) slow(float* out, const float* x, long count) {
  scale(out, x, count, 2, 500);
}
extern "C" __global__ void __launch_bounds__(1024) quick(float* out, const float* x, long count) {
  scale(out, x, count, 2, 1);
}
extern "C" __global__ void __launch_bounds__(1024) wrong(float* out, const float* x, long count) {
  scale(out, x, count, 3, 1);
}
extern "C" __global__ void __launch_bounds__(1024) beyond(float* out, const float* x, long count) {
  scale(out, x, count, 2, 1);
  out[count] = 0;
}
extern "C" __global__ void __launch_bounds__(1024) faulty(float* out, const float* x, long count) {
  out[1L << 40] = 0;
}
