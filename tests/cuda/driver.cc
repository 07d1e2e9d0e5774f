// A stand-in for NVIDIA's driver (libcuda.so.1), for machines without a GPU. A module is a shared
// library of kernels that g++ compiled as C++ (see nvcc.h). Launches are recorded while a stream is
// captured, and run when the graph is launched. Memory ends before a page that nobody may use, so that
// most kernels that access memory beyond their own are found.
#include <dlfcn.h>
#include <elf.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <set>

#include "../fibres.h"
#include "early.h"
#include "warp.h"

using cuda::Function;
using fibres::Index;

namespace {

enum { kSuccess, kInvalidValue, kOutOfMemory, kNoDevice = 100, kInvalidImage = 200,
       kInvalidContext = 201, kNotFound = 500,
       kIllegalAddress = 700, kTooManyResources = 701, kLaunchFailed = 719 };

constexpr unsigned kMaxThreads = 1024;      // in a block
constexpr size_t kSharedBytes = 48 << 10;   // for a block, if its kernel asks for no more
constexpr size_t kMostSharedBytes = 227 << 10;
constexpr int kSharedAttribute = 8;         // of a function: bytes that a launch may add
constexpr size_t kAlignment = 256;          // of memory

// The driver's own types, as its header has them.
struct CUlaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    int programmaticStreamSerializationAllowed;
  } value;
};
struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  void* hStream;
  const CUlaunchAttribute* attrs;
  unsigned numAttrs;
};

bool IsDependent(const CUlaunchConfig& config) {
  constexpr int kProgrammaticStreamSerialization = 6;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != kProgrammaticStreamSerialization) continue;
    return attribute.value.programmaticStreamSerializationAllowed;
  }
  return false;
}

struct Call {
  const Function* function;
  Index groups, threads;
  unsigned added;  // bytes of shared memory
  std::vector<uint64_t> values;  // of the parameters
  bool dependent;
};
using Graph = std::vector<Call>;

std::map<const Function*, int> may_add;  // bytes of shared memory
Graph* capturing;
thread_local void* current_context;  // of every thread its own
int broken;  // the status since a kernel failed
std::string why;

void Declare(void* memory, size_t size) {
  fibres::Declare(memory, size);
  if (fibres::declared_bytes > kSharedBytes) fibres::Fail("a block with too much shared memory");
}

void Start(const cuda::Asynchronous* started) {
  const char* wrong = cuda::Start(*started, fibres::current->thread.x);
  if (wrong) fibres::Fail(wrong);
}

// Returns shared memory that ends, but for alignment, before a page that nobody may use.
char* Added(size_t size) {
  static char* end = nullptr;
  size_t page = size_t(sysconf(_SC_PAGESIZE)), most = (kMostSharedBytes + page - 1) / page * page;
  if (!end) {
    void* pages = mmap(nullptr, most + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    end = static_cast<char*>(pages) + most;
    mprotect(end, page, PROT_NONE);
  }
  return end - (size + 1023) / 1024 * 1024;
}

// Runs blocks last first, because a GPU may run them in any order.
void Run(const Call& call) {
  if (broken) return;
  std::vector<void*> parameters;
  for (const uint64_t& value : call.values) parameters.push_back(const_cast<uint64_t*>(&value));
  auto run = [&] { call.function->run(parameters.data()); };
  why.clear();
  Begin(call.values, call.dependent);
  for (unsigned i = call.groups.x * call.groups.y * call.groups.z; i-- > 0 && why.empty();) {
    Index group = {i % call.groups.x, i / call.groups.x % call.groups.y,
                   i / call.groups.x / call.groups.y};
    have_waited.clear();
    waited_before_barrier = false;
    cuda::block = {{}, Added(call.added)};
    memset(cuda::block.shared, 0xff, call.added);
    why = fibres::RunGroup(run, group, call.threads, Exchange);
    if (why.empty() && cuda::LeftBehind()) why = "a block that ends before its products";
  }
  if (!End() && why.empty()) why = "a dependent launch that never waits";
  if (!why.empty()) broken = why == kIllegal ? kIllegalAddress : kLaunchFailed;
}

// Reads the size of a shared library from its header.
size_t SizeOf(const char* image) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  return header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
}

void* Load(const char* image) {
  char name[] = "/tmp/cuda-module-XXXXXX";
  int file = mkstemp(name);
  size_t size = SizeOf(image);
  bool whole = file >= 0 && write(file, image, size) == ssize_t(size);
  void* module = whole ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (file >= 0) close(file), unlink(name);
  return module;
}

template <class T> bool Set(void* module, const char* name, T value) {
  void* variable = dlsym(module, name);
  if (variable) *static_cast<T*>(variable) = value;
  return variable;
}

// --- The PTX kernel of osscompile/bench/bandwidth_device.py, written again in C++ -----------------

template <class T> T At(void* const* parameters, int i) { return *static_cast<T*>(parameters[i]); }

void ReadMemory(void* const* parameters) {
  const auto* data = At<const uint32_t*>(parameters, 0);
  uint32_t steps = At<uint32_t>(parameters, 2), sum = 0;
  unsigned group = fibres::current->group.x, thread = fibres::current->thread.x;
  constexpr unsigned kThreads = 256;
  for (uint32_t step = 0; step < steps; ++step) {
    size_t first = ((size_t(group) * steps + step) * kThreads + thread) * 4;
    for (int i = 0; i < 4; ++i) sum += data[first + i];
  }
  At<uint32_t*>(parameters, 1)[group * kThreads + thread] = sum;
}
const size_t kReadSizes[] = {8, 8, 4};
const Function kReadMemory = {ReadMemory, kReadSizes, 3, kMaxThreads};
int ptx_module;

}  // namespace

extern "C" {

int fake_launches, fake_graph_launches, fake_freed, fake_devices = 1;
int fake_pinned;  // buffers that are held, which several threads use
int fake_graphs, fake_events, fake_modules, fake_streams, fake_contexts;  // not destroyed
size_t fake_room = size_t(1) << 40;

int cuInit(unsigned) {  // nothing is broken in a new process
  broken = kSuccess;
  return kSuccess;
}
int cuDeviceGet(int* device, int number) {
  *device = number;
  return number < fake_devices ? kSuccess : kNoDevice;
}
int cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "Stand-in") < 0; }
int cuDriverGetVersion(int* version) { return *version = 12040, kSuccess; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int major = 75, minor = 76;  // of the compute capability
  *value = attribute == major ? 9 : 0;
  return attribute == major || attribute == minor ? kSuccess : kInvalidValue;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  return ++fake_contexts, *context = &memories, kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int) { return --fake_contexts, kSuccess; }
int cuCtxSetCurrent(void* context) { return current_context = context, kSuccess; }
int cuStreamCreate(void** stream, unsigned) {
  return ++fake_streams, *stream = &capturing, kSuccess;
}
int cuStreamDestroy_v2(void*) { return --fake_streams, kSuccess; }
int cuStreamSynchronize(void*) { return broken; }

int cuGetErrorString(int status, const char** text) {
  static const std::map<int, const char*> texts = {
      {kInvalidValue, "invalid value"}, {kOutOfMemory, "out of memory"},
      {kNoDevice, "no device"},         {kInvalidImage, "no kernels"},
      {kInvalidContext, "invalid context"}, {kNotFound, "not found"},         {kTooManyResources, "too many resources"}};
  *text = status == broken ? why.c_str() : texts.at(status);
  return kSuccess;
}

int cuMemAlloc_v2(uint64_t* address, size_t size) {
  if (size > fake_room) return kOutOfMemory;
  size_t page = size_t(sysconf(_SC_PAGESIZE)), used = (size + page - 1) / page * page;
  int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
  void* pages = mmap(nullptr, used + page, access, kind, -1, 0);
  if (pages == MAP_FAILED) return kOutOfMemory;
  fake_room -= size;
  memset(pages, 0xff, used);  // not a number
  mprotect(static_cast<char*>(pages) + used, page, PROT_NONE);
  *address = uint64_t(pages) + used - (size + kAlignment - 1) / kAlignment * kAlignment;
  memories[*address] = {static_cast<char*>(pages), used};
  return kSuccess;
}
int cuMemFree_v2(uint64_t address) {
  if (current_context != &memories) return kInvalidContext;
  Memory memory = memories.at(address);
  unfinished.erase(&memories.at(address));
  memories.erase(address);
  ++fake_freed;
  size_t page = size_t(sysconf(_SC_PAGESIZE));
  return munmap(memory.pages, memory.num_bytes + page) ? kInvalidValue : kSuccess;
}
int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t n) {
  unfinished.clear();
  return memset(reinterpret_cast<void*>(to), value, n), broken;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t n) {
  unfinished.clear();  // a copy waits for all launches
  return memcpy(reinterpret_cast<void*>(to), from, n), broken;
}
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t n) {
  return cuMemcpyHtoD_v2(to, reinterpret_cast<void*>(from), n);
}
int cuMemHostAlloc(void** address, size_t size, unsigned) {
  ++fake_pinned;
  return *address = malloc(size), kSuccess;
}
int cuMemFreeHost(void* address) {
  --fake_pinned;
  return free(address), kSuccess;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, void*) {
  // It waits for the launches of its own stream only, which are done.
  if (current_context != &memories) return kInvalidContext;
  return memcpy(reinterpret_cast<void*>(to), from, n), broken;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, void*) {
  return cuMemcpyHtoD_v2(uint64_t(to), reinterpret_cast<void*>(from), n);
}

int cuModuleLoadData(void** module, const char* image) {
  bool is_code = !memcmp(image, ELFMAG, SELFMAG);
  *module = is_code ? Load(image) : strstr(image, ".visible .entry") ? &ptx_module : nullptr;
  fake_modules += *module != nullptr;
  if (!*module || *module == &ptx_module) return *module ? kSuccess : kInvalidImage;
  bool set = Set(*module, "cuda_barrier", Barrier) && Set(*module, "cuda_ask", Ask) &&
             Set(*module, "cuda_let_next_begin", LetNextBegin) && Set(*module, "cuda_start", Start) &&
             Set(*module, "cuda_added", &cuda::block.shared) &&
             Set(*module, "cuda_declare", Declare) && Set(*module, "cuda_position", &fibres::current);
  struct sigaction handler = {};
  handler.sa_sigaction = OnFault;
  handler.sa_flags = SA_SIGINFO | SA_NODEFER;
  struct sigaction before;
  sigaction(SIGSEGV, &handler, &before);
  if (before.sa_sigaction != OnFault) python_handler = before;
  return set ? kSuccess : kInvalidImage;
}
int cuModuleUnload(void* module) {
  --fake_modules;
  return module == &ptx_module || !dlclose(module) ? kSuccess : kInvalidValue;
}
int cuModuleGetFunction(const void** function, void* module, const char* name) {
  bool is_read = module == &ptx_module && !strcmp(name, "read_memory");
  std::string entry = std::string("entry_") + name;
  *function = is_read ? &kReadMemory : module == &ptx_module ? nullptr : dlsym(module, entry.c_str());
  return *function ? kSuccess : kNotFound;
}
int cuFuncGetParamInfo(const Function* function, size_t index, size_t*, size_t* size) {
  if (index >= size_t(function->count)) return kInvalidValue;
  *size = function->sizes[index];
  return kSuccess;
}

int cuFuncSetAttribute(const Function* function, int attribute, int value) {
  if (attribute != kSharedAttribute || value > int(kMostSharedBytes)) return kInvalidValue;
  may_add[function] = value;
  return kSuccess;
}
int cuLaunchKernelEx(const CUlaunchConfig* config, const Function* function, void** parameters,
                     void**) {
  Index groups = {config->gridDimX, config->gridDimY, config->gridDimZ};
  Index threads = {config->blockDimX, config->blockDimY, config->blockDimZ};
  unsigned added = config->sharedMemBytes;
  if (threads.x * threads.y * threads.z > function->max_threads) return kTooManyResources;
  if (added > std::max(kSharedBytes, size_t(may_add[function]))) return kInvalidValue;
  Call call = {function, groups, threads, added, std::vector<uint64_t>(function->count),
               IsDependent(*config)};
  for (int i = 0; i < function->count; ++i) {
    memcpy(&call.values[i], parameters[i], function->sizes[i]);
  }
  if (capturing) return capturing->push_back(call), kSuccess;
  ++fake_launches;
  Run(call);
  return kSuccess;  // a later call tells that it failed
}
int cuStreamBeginCapture_v2(void*, int) { return capturing = new Graph, kSuccess; }
int cuStreamEndCapture(void*, Graph** graph) {
  *graph = capturing;
  capturing = nullptr;
  return kSuccess;
}
int cuGraphInstantiateWithFlags(Graph** instance, Graph* graph, unsigned long long) {
  ++fake_graphs;
  *instance = new Graph(*graph);
  return kSuccess;
}
int cuGraphDestroy(Graph* graph) { return delete graph, kSuccess; }
int cuGraphExecDestroy(Graph* instance) {
  --fake_graphs;
  return delete instance, kSuccess;
}
int cuGraphUpload(Graph*, void*) { return kSuccess; }
int cuGraphLaunch(Graph* graph, void*) {
  ++fake_graph_launches;
  unfinished.clear();
  for (const Call& call : *graph) Run(call);
  return kSuccess;
}

int cuEventCreate(timespec** event, unsigned) {
  ++fake_events;
  *event = new timespec();
  return kSuccess;
}
int cuEventDestroy_v2(timespec* event) {
  --fake_events;
  return delete event, kSuccess;
}
int cuEventRecord(timespec* event, void*) { return clock_gettime(CLOCK_MONOTONIC, event); }
int cuEventElapsedTime(float* milliseconds, const timespec* a, const timespec* b) {
  *milliseconds = float((b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6);
  return broken;
}

}  // extern "C"
