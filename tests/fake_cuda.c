/* A stand-in for NVIDIA's driver: memory is the host's, a module is a shared library, and a kernel a
 * function of it that gets the pointers to its parameters, the groups and the threads. What is launched
 * while a stream is captured is kept, and done when the graph is launched. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef void (*Kernel)(void **parameters, const unsigned *sizes);
typedef struct { Kernel run; const size_t *sizes; int count; } Function;
typedef struct { Function *function; unsigned sizes[6]; void **parameters; } Call;
typedef struct { Call calls[4096]; int count; } Graph;

int fake_launches, fake_graph_launches, fake_freed, fake_devices = 1;
int fake_graphs, fake_events;  /* that were not destroyed */
size_t fake_room = 1 << 30;
static Graph *capturing;
static int dead;  /* since a kernel used an address that is none */

int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number < fake_devices ? 0 : 100; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Stand-in"); return 0; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &capturing; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = &fake_launches; return 0; }
int cuStreamSynchronize(void *stream) { return dead ? 700 : 0; }

int cuGetErrorString(int status, const char **text) {
  *text = status == 2 ? "out of memory" : status == 100 ? "no device" : status == 700 ? "illegal address"
          : status == 701 ? "too many resources" : "not found";
  return 0;
}

int cuMemAlloc_v2(uint64_t *address, size_t size) {
  if (size > fake_room) return 2;
  fake_room -= size;
  *address = (uint64_t)malloc(size);
  memset((void *)*address, 0xCD, size);
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  fake_freed++;
  free((void *)address);
  return 0;
}
int cuMemsetD8_v2(uint64_t a, unsigned char value, size_t n) { memset((void *)a, value, n); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) { memcpy((void *)to, from, n); return 0; }
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t n) {
  memcpy((void *)to, (void *)from, n);
  return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) {
  return cuMemcpyHtoD_v2(to, from, n);
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream) {
  memcpy(to, (void *)from, n);
  return 0;
}

int cuModuleLoadData(void **module, const char *image) {
  int is_code = !memcmp(image, "\x7f" "ELF", 4) || strstr(image, ".visible .entry");
  *module = dlopen(getenv("FAKE_CUDA_MODULE"), RTLD_NOW);
  return is_code && *module ? 0 : 200;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = dlsym(module, name);
  return *function ? 0 : 500;
}
int cuFuncGetParamInfo(Function *f, size_t index, size_t *offset, size_t *size) {
  if (index >= (size_t)f->count) return 1;
  *size = f->sizes[index];
  return 0;
}

int cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned tx, unsigned ty,
                   unsigned tz, unsigned shared, void *stream, void **parameters, void **extra) {
  Call call = {f, {gx, gy, gz, tx, ty, tz}, parameters};
  if (tx * ty * tz > 1024) return 701;
  if (!capturing) {
    fake_launches++;
    f->run(call.parameters, call.sizes);
    return 0;
  }
  call.parameters = malloc(f->count * sizeof(void *));  /* the driver copies what they point to */
  for (int i = 0; i < f->count; i++)
    call.parameters[i] = memcpy(malloc(8), parameters[i], f->sizes[i]);
  capturing->calls[capturing->count++] = call;
  return 0;
}
int cuStreamBeginCapture_v2(void *stream, int mode) { capturing = calloc(1, sizeof(Graph)); return 0; }
int cuStreamEndCapture(void *stream, void **graph) { *graph = capturing; capturing = 0; return 0; }
int cuGraphInstantiateWithFlags(void **instance, void *graph, unsigned long long flags) {
  fake_graphs++;
  *instance = memcpy(malloc(sizeof(Graph)), graph, sizeof(Graph));
  return 0;
}
int cuGraphDestroy(void *graph) { free(graph); return 0; }
int cuGraphExecDestroy(void *instance) { fake_graphs--; free(instance); return 0; }
int cuGraphUpload(void *instance, void *stream) { return 0; }
int cuGraphLaunch(Graph *graph, void *stream) {
  fake_graph_launches++;
  for (int i = 0; i < graph->count; i++)
    graph->calls[i].function->run(graph->calls[i].parameters, graph->calls[i].sizes);
  return 0;
}

int cuEventCreate(void **event, unsigned flags) {
  fake_events++;
  *event = calloc(1, sizeof(struct timespec));
  return 0;
}
int cuEventDestroy_v2(void *event) { fake_events--; free(event); return 0; }
int cuEventRecord(struct timespec *event, void *stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
int cuEventElapsedTime(float *ms, struct timespec *a, struct timespec *b) {
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6;
  return dead ? 700 : 0;
}

/* --- The module: some kernels ------------------------------------------------------------------- */

/* A thread a number: twice(out, ids, count) writes 2 x ids. */
static void run_twice(void **p, const unsigned *sizes) {
  float *out = *(float **)p[0];
  int *ids = *(int **)p[1];
  for (int64_t i = 0; i < (int64_t)sizes[0] * sizes[3] && i < *(int64_t *)p[2]; i++) out[i] = 2 * ids[i];
}
static const size_t twice_sizes[] = {8, 8, 8};
Function twice = {run_twice, twice_sizes, 3};

/* add(out, position, cache, count, first) adds the position and what the cache holds, and counts in it. */
static void run_add(void **p, const unsigned *sizes) {
  float *out = *(float **)p[0], *cache = *(float **)p[2];
  for (int64_t i = 0; i < *(int64_t *)p[3]; i++) out[i] += (*(int **)p[1])[0] + cache[0] + *(int *)p[4];
  cache[0] += 1;
}
static const size_t add_sizes[] = {8, 8, 8, 8, 4};
Function add = {run_add, add_sizes, 5};

/* A thread a number: slow(out, x, count) and quick(...) write 2 x; wrong(...) writes 3 x. */
static void scale(void **p, const unsigned *sizes, float factor, int times) {
  volatile float *out = *(float **)p[0];
  const float *x = *(float **)p[1];
  while (times--)
    for (int64_t i = 0; i < (int64_t)sizes[0] * sizes[3] && i < *(int64_t *)p[2]; i++) out[i] = factor * x[i];
}
static void run_slow(void **p, const unsigned *sizes) { scale(p, sizes, 2, 50); }
static void run_quick(void **p, const unsigned *sizes) { scale(p, sizes, 2, 1); }
static void run_wrong(void **p, const unsigned *sizes) { scale(p, sizes, 3, 1); }
static void run_beyond(void **p, const unsigned *sizes) {
  scale(p, sizes, 2, 1);
  (*(float **)p[0])[*(int64_t *)p[2]] = 0;
}
static void run_faulty(void **p, const unsigned *sizes) { dead = 1; }
Function slow = {run_slow, twice_sizes, 3}, quick = {run_quick, twice_sizes, 3};
Function wrong = {run_wrong, twice_sizes, 3}, beyond = {run_beyond, twice_sizes, 3};
Function faulty = {run_faulty, twice_sizes, 3};

/* What `bench_device_bandwidth.py` has in PTX. */
static void run_read_memory(void **p, const unsigned *sizes) {
  const uint32_t *data = *(uint32_t **)p[0];
  uint32_t *sums = *(uint32_t **)p[1];
  uint32_t steps = *(uint32_t *)p[2], width = sizes[3];
  for (uint32_t group = 0; group < sizes[0]; group++)
    for (uint32_t thread = 0; thread < width; thread++) {
      uint32_t sum = 0;
      for (uint32_t step = 0; step < steps; step++)
        for (int k = 0; k < 4; k++) sum += data[(((uint64_t)group * steps + step) * width + thread) * 4 + k];
      sums[group * width + thread] = sum;
    }
}
static const size_t read_sizes[] = {8, 8, 4};
Function read_memory = {run_read_memory, read_sizes, 3};
