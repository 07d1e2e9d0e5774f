// A stand-in for TVM's Metal runtime (libtvm_runtime_metal), for machines without Metal: g++ compiles
// kernels as C++ (see metal_stdlib), and they run on the CPU. TVM's virtual machine, host code,
// allocators and copies are the real ones.
#include <dlfcn.h>
#include <stdlib.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "../fibres.h"

namespace ffi = tvm::ffi;
using tvm::Device;

namespace {

constexpr unsigned kNoValue = 0x7fc00bad;  // NaN: the value of lanes that shuffle none
constexpr unsigned kMaxThreads = 1024;     // in a threadgroup

// The failure of the first kernel that failed, kept as TVM's runtime keeps it. A wait or a copy tells
// it, and no kernel does anything until the device is reset.
std::string failure;

void TellFailure() { TVM_FFI_CHECK(failure.empty(), RuntimeError) << "GPUError after kernel " << failure; }

// --- Threadgroups ----------------------------------------------------------------------------

using fibres::Index;  // laid out as the first numbers of uint3

struct alignas(16) Index3 {  // laid out as uint3
  Index index;
};
struct Thread {  // as in metal_stdlib
  void* const* arguments;
  Index3 group, thread;
};
using Kernel = void (*)(const Thread&);

using Work = const char* (*)(void* const* lanes);  // returns what is wrong, or null

struct Request {
  unsigned value, delta;  // of a shuffle
  Work work;              // else a task of all lanes together
  void* own;              // this lane's argument to it
  const char* wrong;
};

unsigned Wait(bool shuffle, unsigned value, unsigned delta) {
  Request request{value, delta, nullptr, nullptr, nullptr};
  shuffle ? fibres::Ask(&request) : fibres::Barrier();
  return request.value;
}

void Together(Work work, void* own) {
  Request request{0, 0, work, own, nullptr};
  fibres::Ask(&request);
  if (request.wrong) fibres::Fail(request.wrong);
}

unsigned Lane() { return fibres::current->lane; }

// Lanes that do not take part give kNoValue.
unsigned ShuffleDown(Request* const* lanes, unsigned num_lanes) {
  std::vector<unsigned> given(num_lanes, kNoValue);
  unsigned answered = 0;
  for (unsigned i = 0; i < num_lanes; ++i) {
    if (lanes[i] && !lanes[i]->work) given[i] = lanes[i]->value, answered |= 1u << i;
  }
  for (unsigned i = 0; i < num_lanes; ++i) {
    if (!(answered >> i & 1)) continue;
    unsigned source = i + lanes[i]->delta;
    lanes[i]->value = source < num_lanes ? given[source] : kNoValue;
  }
  return answered;
}

unsigned Exchange(void* const* requests, unsigned num_lanes) {
  Request* lanes[fibres::kSimdWidth] = {};
  void* own[fibres::kSimdWidth];
  unsigned together = 0;
  for (unsigned i = 0; i < num_lanes; ++i) {
    lanes[i] = static_cast<Request*>(requests[i]);
    if (!lanes[i] || !lanes[i]->work || (lanes[0] && lanes[i]->work != lanes[0]->work)) continue;
    own[i] = lanes[i]->own;
    ++together;
  }
  if (together < fibres::kSimdWidth) return ShuffleDown(lanes, num_lanes);
  lanes[0]->wrong = lanes[0]->work(own);
  return ~0u;
}

void RunGroup(const std::string& name, Kernel kernel, void* const* arguments, Index group,
              Index size) {
  auto run = [kernel, arguments] {
    kernel({arguments, {fibres::current->group}, {fibres::current->thread}});
  };
  std::string wrong = fibres::RunGroup(run, group, size, Exchange);
  if (!wrong.empty()) failure = name + ": " + wrong;
}

// --- Kernels ---------------------------------------------------------------------------------

// The data that TVM writes for a kernel; see SaveToBytes of its Metal modules.
struct Info {
  std::string source;
  std::vector<DLDataType> types;
  std::vector<std::string> tags;  // of the numbers that follow the arguments
};

class Reader {
 public:
  explicit Reader(const ffi::Bytes& bytes) : at_(bytes.data()), end_(at_ + bytes.size()) {}
  template <class T> T Read() {
    T value;
    Take(&value, sizeof(T));
    return value;
  }
  std::string ReadString() {
    std::string text(Read<uint64_t>(), '\0');
    Take(text.data(), text.size());
    return text;
  }

 private:
  void Take(void* to, size_t size) {
    TVM_FFI_ICHECK_LE(size, size_t(end_ - at_)) << "a module that is cut off";
    memcpy(to, at_, size);
    at_ += size;
  }
  const char *at_, *end_;
};

std::map<std::string, Info> ReadKernels(const ffi::Bytes& bytes) {
  Reader reader(bytes);
  std::string format = reader.ReadString();
  TVM_FFI_ICHECK_EQ(format, "metal");
  std::map<std::string, Info> kernels;
  for (uint64_t n = reader.Read<uint64_t>(); n > 0; --n) {
    Info& info = kernels[reader.ReadString()];
    reader.ReadString();  // the name again
    for (uint64_t i = reader.Read<uint64_t>(); i > 0; --i) {
      info.types.push_back(reader.Read<DLDataType>());
    }
    for (uint64_t i = reader.Read<uint64_t>(); i > 0; --i) info.tags.push_back(reader.ReadString());
    for (uint64_t i = reader.Read<uint64_t>(); i > 0; --i) reader.Read<int32_t>();
  }
  for (uint64_t n = reader.Read<uint64_t>(); n > 0; --n) {
    Info& info = kernels.at(reader.ReadString());
    info.source = reader.ReadString();
  }
  return kernels;
}

// Makes a threadgroup's memory static, since one threadgroup runs at a time. Metal allows its
// declaration only where a kernel begins.
std::string ShareMemory(const std::string& source) {
  static const std::regex nested("\n {3,}threadgroup \\w+ \\w+\\[");
  TVM_FFI_ICHECK(!std::regex_search(source, nested)) << "threadgroup memory in an inner scope";
  static const std::regex declaration("\n  threadgroup (\\w+ (\\w+)\\[\\d+\\];)");
  const char* shared = "\n  static $1 metal_declare($2, sizeof($2));";
  return std::regex_replace(source, declaration, shared);
}

// Compiles all kernels into one library, and the same kernels only once.
void* Compile(const std::map<std::string, Info>& kernels) {
  std::string text = "#include <metal_stdlib>\n";
  for (const auto& [name, info] : kernels) {
    text += "namespace of_" + name + " {\n" + ShareMemory(info.source) + "extern \"C\" void call_" +
            name + "(const metal::Thread& t) { metal::call(" + name + ", t); }\n}\n";
  }
  static std::map<std::string, void*> compiled;
  if (compiled.count(text)) return compiled[text];
  std::string folder = std::filesystem::temp_directory_path() / "metal-XXXXXX";
  TVM_FFI_ICHECK(mkdtemp(folder.data())) << "no temporary folder";
  std::string base = folder + "/kernels";
  std::ofstream(base + ".cc") << text;
  std::string command = std::string(getenv("METAL_COMPILER")) + " -shared -fPIC -O1 -o " + base +
                        ".so " + base + ".cc";
  TVM_FFI_ICHECK_EQ(system(command.c_str()), 0) << "kernels that do not compile: " << base << ".cc";
  void* library = dlopen((base + ".so").c_str(), RTLD_NOW);
  TVM_FFI_ICHECK(library) << dlerror();
  *static_cast<decltype(&Wait)*>(dlsym(library, "metal_wait")) = Wait;
  *static_cast<decltype(&Together)*>(dlsym(library, "metal_together")) = Together;
  *static_cast<decltype(&Lane)*>(dlsym(library, "metal_lane")) = Lane;
  *static_cast<decltype(&fibres::Declare)*>(dlsym(library, "metal_declare")) =
      fibres::Declare;
  std::filesystem::remove_all(folder);
  return compiled[text] = library;
}

// Memory of the device; the host has only a handle to it.
struct Buffer {
  std::vector<char> memory;
};

class MetalModule : public ffi::ModuleObj {
 public:
  explicit MetalModule(const ffi::Bytes& bytes) : kernels_(ReadKernels(bytes)) {}
  const char* kind() const final { return "metal"; }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = kernels_.find(name);
    if (found == kernels_.end()) return std::nullopt;
    void* library = Compile(kernels_);
    auto call = reinterpret_cast<Kernel>(dlsym(library, ("call_" + found->first).c_str()));
    return ffi::Function::FromPacked([this, call, found](ffi::PackedArgs args, ffi::Any*) {
      Launch(found->first, found->second, call, args);
    });
  }

 private:
  void Launch(const std::string& name, const Info& info, Kernel call, ffi::PackedArgs args) {
    std::vector<void*> memory;
    std::vector<int64_t> numbers;  // in one buffer, with 8 bytes each
    for (size_t i = 0; i < info.types.size(); ++i) {
      if (info.types[i].code == kDLOpaqueHandle) {
        TVM_FFI_ICHECK(numbers.empty()) << "a buffer after a number";
        memory.push_back(static_cast<Buffer*>(args[i].cast<void*>())->memory.data());
      } else {
        numbers.push_back(args[i].cast<int64_t>());
      }
    }
    memory.push_back(numbers.data());
    std::map<std::string, unsigned> sizes;
    for (size_t i = 0; i < info.tags.size(); ++i) {
      sizes[info.tags[i]] = unsigned(args[info.types.size() + i].cast<int64_t>());
    }
    auto size = [&](const char* tag) { return sizes.count(tag) ? sizes[tag] : 1u; };
    Index groups{size("blockIdx.x"), size("blockIdx.y"), size("blockIdx.z")};
    Index threads{size("threadIdx.x"), size("threadIdx.y"), size("threadIdx.z")};
    TVM_FFI_ICHECK_LE(threads.x * threads.y * threads.z, kMaxThreads) << "threads of " << name;
    for (unsigned z = 0; z < groups.z; ++z) {
      for (unsigned y = 0; y < groups.y; ++y) {
        for (unsigned x = 0; x < groups.x; ++x) {
          if (failure.empty()) RunGroup(name, call, memory.data(), {x, y, z}, threads);
        }
      }
    }
  }

  std::map<std::string, Info> kernels_;
};

// --- The device ------------------------------------------------------------------------------

class MetalDevice final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(Device) final {}
  void GetAttr(Device, tvm::runtime::DeviceAttrKind kind, ffi::Any* value) final {
    const char* room = getenv("METAL_ROOM");
    if (kind == tvm::runtime::kExist) *value = getenv("METAL_NO_DEVICE") ? 0 : 1;
    if (kind == tvm::runtime::kTotalGlobalMemory) *value = room ? atoll(room) : int64_t(1) << 40;
  }
  void* AllocDataSpace(Device, size_t size, size_t, DLDataType) final {
    held_bytes += size;
    return new Buffer{std::vector<char>(size, char(0xff))};  // NaN
  }
  void FreeDataSpace(Device, void* data) final {
    Buffer* buffer = static_cast<Buffer*>(data);
    held_bytes -= buffer->memory.size();
    delete buffer;
  }
  void StreamSync(Device, TVMStreamHandle) final { TellFailure(); }

  int64_t held_bytes = 0;

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t size,
                      Device dev_from, Device dev_to, DLDataType, TVMStreamHandle) final {
    TellFailure();
    memmove(Memory(to, to_offset, size, dev_to),
            Memory(const_cast<void*>(from), from_offset, size, dev_from), size);
  }

 private:
  static char* Memory(void* data, size_t offset, size_t size, Device device) {
    if (device.device_type == kDLCPU) return static_cast<char*>(data) + offset;
    std::vector<char>& memory = static_cast<Buffer*>(data)->memory;
    TVM_FFI_ICHECK_LE(offset + size, memory.size()) << "a copy beyond the buffer";
    return memory.data() + offset;
  }
};

MetalDevice* TheDevice() {
  static auto* device = new MetalDevice();
  return device;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  ffi::reflection::GlobalDef()
      .def("device_api.metal",
           []() -> void* { return static_cast<tvm::runtime::DeviceAPI*>(TheDevice()); })
      .def("metal.ResetGlobalState", []() { failure.clear(); })
      .def("metal.held_bytes", []() { return TheDevice()->held_bytes; })  // not a function of TVM
      .def("ffi.Module.load_from_bytes.metal", [](const ffi::Bytes& bytes) {
        return ffi::Module(ffi::make_object<MetalModule>(bytes));
      });
}

}  // namespace
