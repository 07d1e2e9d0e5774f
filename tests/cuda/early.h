// Memory, and who may use it when: a launch may begin before the one before it has ended.
//
// A dependent launch runs after the one before it, but until its threads wait, the memory that this
// one wrote, and so may still write, cannot be read, and none can be written.
#ifndef EARLY
#define EARLY

#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>

#include <iterator>
#include <map>
#include <set>
#include <vector>

#include "../fibres.h"
#include "warp.h"

namespace {

const char kIllegal[] = "illegal address";

struct Memory {
  char* pages;
  size_t num_bytes;
  int access = PROT_READ | PROT_WRITE;
};

std::map<uint64_t, Memory> memories;
struct sigaction python_handler;

std::set<Memory*> arguments;   // of the launch that runs
std::set<Memory*> written;     // by it
std::set<Memory*> unfinished;  // may still be written by launches before it when it begins
std::set<fibres::Fibre*> have_waited;  // of its group
bool depends, anyone_waited, next_begins_early, waited_before_barrier;
bool early;  // whether the arguments are as a thread that has not waited may use them

Memory* Find(uint64_t address) {
  auto after = memories.upper_bound(address);
  if (after == memories.begin()) return nullptr;
  Memory* memory = &std::prev(after)->second;
  return address - uint64_t(memory->pages) < memory->num_bytes ? memory : nullptr;
}

void Allow(Memory* memory, int access) {
  if (memory->access == access) return;
  mprotect(memory->pages, memory->num_bytes, access);
  memory->access = access;
}

void AllowArguments(bool before_wait) {
  if (early == before_wait) return;
  early = before_wait;
  for (Memory* memory : arguments) {
    if (early) Allow(memory, unfinished.count(memory) ? PROT_NONE : PROT_READ);
    else Allow(memory, written.count(memory) ? PROT_READ | PROT_WRITE : PROT_READ);
  }
}

void HasWaited(fibres::Fibre* fibre) {
  have_waited.insert(fibre);
  anyone_waited = true;
}

void Resuming(fibres::Fibre* fibre) { AllowArguments(depends && !have_waited.count(fibre)); }

void LetNextBegin() {
  if (depends && !have_waited.count(fibres::current)) next_begins_early = true;
}

// What one thread waited for, others may use after a barrier.
void Barrier() {
  waited_before_barrier |= have_waited.count(fibres::current);
  fibres::Barrier();
  if (waited_before_barrier && have_waited.insert(fibres::current).second) AllowArguments(false);
}

void Ask(void* request) {
  static_cast<cuda::Request*>(request)->fibre = fibres::current;
  fibres::Ask(request);
}

unsigned Exchange(void* const* requests, unsigned num_lanes) {
  for (unsigned i = 0; i < num_lanes; ++i) {
    auto* request = static_cast<cuda::Request*>(requests[i]);
    if (request && request->kind == cuda::Request::kWaitLaunch) {
      HasWaited(static_cast<fibres::Fibre*>(request->fibre));
    }
  }
  return cuda::Exchange(requests, num_lanes);
}

// Tells of memory that may not be used so, or allows a launch's first write and notes it.
void OnFault(int, siginfo_t* info, void*) {
  Memory* memory = Find(uint64_t(info->si_addr));
  if (fibres::current && memory && arguments.count(memory)) {
    if (early && unfinished.count(memory)) {
      fibres::Fail("a thread uses what the launch before writes, and has not waited for it");
    }
    if (early) fibres::Fail("a thread writes before it has waited for the launch before");
    written.insert(memory);
    return Allow(memory, PROT_READ | PROT_WRITE);
  }
  if (fibres::current) fibres::Fail(kIllegal);
  sigaction(SIGSEGV, &python_handler, nullptr);  // the access faults again, under this handler
}

void Begin(const std::vector<uint64_t>& parameters, bool dependent) {
  depends = dependent;
  if (!depends) unfinished.clear();
  for (uint64_t value : parameters) {
    if (Memory* memory = Find(value)) arguments.insert(memory);
  }
  anyone_waited = next_begins_early = false;
  early = !depends;  // so that the first thread sets it
  AllowArguments(depends);
  fibres::resuming = Resuming;
}

// Returns whether the launch waited, if it had to.
bool End() {
  for (Memory* memory : arguments) Allow(memory, PROT_READ | PROT_WRITE);
  if (!next_begins_early) unfinished.clear();
  unfinished.insert(written.begin(), written.end());
  arguments.clear();
  written.clear();
  return anyone_waited || !depends;
}

}  // namespace

#endif
