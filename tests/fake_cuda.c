/* A stand-in for NVIDIA's driver: memory is the host's, a module is a shared library, and a kernel a
 * function of it that gets the pointers to its parameters, the groups and the threads. What is launched
 * while a stream is captured is kept, and done when the graph is launched. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef void (*Kernel)(void **parameters, const unsigned *sizes);
typedef struct { Kernel run; const size_t *sizes; int count; } Function;
typedef struct { Function *function; unsigned sizes[6]; void **parameters; } Call;
typedef struct { Call calls[64]; int count; } Graph;

int fake_launches, fake_graph_launches, fake_freed, fake_devices = 1;
size_t fake_room = 1 << 20;
static Graph *capturing;

int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number < fake_devices ? 0 : 100; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &capturing; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = &fake_launches; return 0; }
int cuStreamSynchronize(void *stream) { return 0; }

int cuGetErrorString(int status, const char **text) {
  *text = status == 2 ? "out of memory" : status == 100 ? "no device" : "not found";
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
  *module = dlopen(getenv("FAKE_CUDA_MODULE"), RTLD_NOW);
  return memcmp(image, "\x7f" "ELF", 4) || !*module ? 200 : 0;
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
  *instance = graph;
  return 0;
}
int cuGraphLaunch(Graph *graph, void *stream) {
  fake_graph_launches++;
  for (int i = 0; i < graph->count; i++)
    graph->calls[i].function->run(graph->calls[i].parameters, graph->calls[i].sizes);
  return 0;
}

/* --- The module: two kernels -------------------------------------------------------------------- */

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
