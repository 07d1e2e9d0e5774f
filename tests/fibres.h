// The threads of a GPU's work-group on one thread of the CPU, for the stand-ins in metal/ and cuda/.
//
// They are fibres. One runs until it waits for others. Barriers, and exchanges between the lanes of a
// SIMD-group, are done once all threads wait, so that a barrier that some threads miss is found.
#ifndef FIBRES
#define FIBRES

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace fibres {
namespace {  // every stand-in has its own copy

constexpr unsigned kSimdWidth = 32;
constexpr size_t kStackBytes = (32 << 10) + 192;  // so that stacks use different cache lines

struct Index {
  unsigned x, y, z;
};

struct Position {
  Index group, thread;
};

enum class State { kRunning, kBarrier, kExchange, kDone };

struct Fibre : Position {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  jmp_buf place;
  State state;
  unsigned lane;  // in its SIMD-group
  void* request;  // for an exchange
};

// Answers those requests of a SIMD-group's lanes that can be answered now (null where a lane makes
// none), and returns a bit for each lane that goes on.
using Exchange = unsigned (*)(void* const* requests, unsigned num_lanes);

std::vector<std::unique_ptr<Fibre>> all;
Fibre* current;  // null while no fibre runs
std::function<void()> body;
std::string failure;
jmp_buf scheduler;
ucontext_t starter;

void Leave(State state) {
  current->state = state;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void RunForever() {
  while (true) {
    body();
    Leave(State::kDone);
  }
}

// Lets the running thread wait for all others of its group.
void Barrier() { Leave(State::kBarrier); }

// Waits for the answer to a request, which the request then holds.
void Ask(void* request) {
  current->request = request;
  Leave(State::kExchange);
}

// Ends the group.
void Fail(const char* why) {
  failure = why;
  Leave(State::kDone);
}

// A kernel declares a work-group's memory where it begins. Groups run one at a time and share it, so
// what another group left there is cleared.
std::vector<void*> declared;
size_t declared_bytes;

void Declare(void* memory, size_t size) {
  if (std::find(declared.begin(), declared.end(), memory) != declared.end()) return;
  declared.push_back(memory);
  declared_bytes += size;
  memset(memory, 0xff, size);  // NaN
}

void Make() {
  all.push_back(std::make_unique<Fibre>());
  current = all.back().get();
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = current->stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, [] { Leave(State::kDone), RunForever(); }, 0);
  if (!_setjmp(scheduler)) swapcontext(&starter, &context);
}

void (*resuming)(Fibre*);  // called before a fibre goes on, if it is set

void Resume(Fibre* fibre) {
  if (resuming) resuming(fibre);
  current = fibre;
  fibre->state = State::kRunning;
  if (!_setjmp(scheduler)) _longjmp(fibre->place, 1);
}

// Returns how many lanes of all SIMD-groups go on.
unsigned ExchangeAll(unsigned count, Exchange exchange) {
  unsigned answered = 0;
  for (unsigned first = 0; first < count; first += kSimdWidth) {
    void* requests[kSimdWidth] = {};
    unsigned num_lanes = std::min(kSimdWidth, count - first);
    for (unsigned i = 0; i < num_lanes; ++i) {
      Fibre* fibre = all[first + i].get();
      if (fibre->state == State::kExchange) requests[i] = fibre->request;
    }
    unsigned lanes = exchange(requests, num_lanes);
    for (unsigned i = 0; i < num_lanes; ++i) {
      if (lanes >> i & 1) all[first + i]->state = State::kRunning, ++answered;
    }
  }
  return answered;
}

// Runs all threads of a group; returns what is wrong with them, or nothing.
std::string RunAll(unsigned count, Exchange exchange) {
  static bool backwards = false;
  backwards = !backwards;  // by turns, so that a missing barrier shows
  while (true) {
    unsigned in[4] = {};
    for (unsigned n = 0; n < count; ++n) {
      Fibre* fibre = all[backwards ? count - 1 - n : n].get();
      if (fibre->state == State::kRunning) Resume(fibre);
      if (!failure.empty()) return failure;
      ++in[int(fibre->state)];
    }
    if (in[int(State::kDone)] == count) return "";
    if (ExchangeAll(count, exchange)) continue;
    if (in[int(State::kBarrier)] < count) {
      bool lanes = in[int(State::kExchange)];
      return std::to_string(in[int(lanes ? State::kExchange : State::kBarrier)]) + " of " +
             std::to_string(count) + " threads wait " +
             (lanes ? "for lanes of their SIMD-group" : "at a barrier") + " that the others do not reach";
    }
    for (unsigned i = 0; i < count; ++i) all[i]->state = State::kRunning;
  }
}

// Calls `run` in every thread of a group; returns what is wrong, or nothing.
std::string RunGroup(std::function<void()> run, Index group, Index size, Exchange exchange) {
  unsigned count = size.x * size.y * size.z;
  while (all.size() < count) Make();
  body = std::move(run);
  declared.clear();
  declared_bytes = 0;
  for (unsigned i = 0; i < count; ++i) {
    Position position = {group, {i % size.x, i / size.x % size.y, i / size.x / size.y}};
    static_cast<Position&>(*all[i]) = position;
    all[i]->state = State::kRunning;
    all[i]->lane = i % kSimdWidth;
  }
  std::string wrong = RunAll(count, exchange);
  current = nullptr;
  failure.clear();
  if (!wrong.empty()) all.clear();  // fibres that are not done cannot be used again
  return wrong;
}

}  // namespace
}  // namespace fibres

#endif
