// The threads of a GPU's work-group on one thread of the CPU, for the stand-ins in metal/ and cuda/.
//
// They are fibres. One runs until it waits for others; what threads do together, barriers and what the
// lanes of a SIMD-group exchange, is done once all of them wait, so that a barrier that some threads
// miss is found.
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
namespace {  // every stand-in has its own

constexpr unsigned kSimdWidth = 32;
constexpr size_t kStackBytes = (32 << 10) + 192;  // so that they do not share lines of the cache

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
  unsigned lane;  // of its SIMD-group
  void* request;  // of its exchange
};

// Answers the requests of the lanes of a SIMD-group, null where a lane makes none, as far as they can be
// answered now: bits of the lanes that go on.
using Exchange = unsigned (*)(void* const* requests, unsigned num_lanes);

std::vector<std::unique_ptr<Fibre>> all;
Fibre* current;  // null while none runs
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

// Of the thread that runs: wait for all others of its group.
void Barrier() { Leave(State::kBarrier); }

// Wait for an answer to a request, which it holds afterwards.
void Ask(void* request) {
  current->request = request;
  Leave(State::kExchange);
}

// Ends the group.
void Fail(const char* why) {
  failure = why;
  Leave(State::kDone);
}

// Memory of the work-group, of which one runs at a time, is declared where a kernel begins; what
// another group left there is no value of this one.
std::vector<void*> declared;
size_t declared_bytes;

void Declare(void* memory, size_t size) {
  if (std::find(declared.begin(), declared.end(), memory) != declared.end()) return;
  declared.push_back(memory);
  declared_bytes += size;
  memset(memory, 0xff, size);  // not a number
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

void Resume(Fibre* fibre) {
  current = fibre;
  fibre->state = State::kRunning;
  if (!_setjmp(scheduler)) _longjmp(fibre->place, 1);
}

// How many lanes of all SIMD-groups go on.
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

// All threads of a group; what is wrong with them, or nothing.
std::string RunAll(unsigned count, Exchange exchange) {
  static bool backwards = false;
  backwards = !backwards;  // in turns, so that a barrier that is missing shows
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

// `run` in every thread of a group; what is wrong, or nothing.
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
  if (!wrong.empty()) all.clear();  // they are where they are
  return wrong;
}

}  // namespace
}  // namespace fibres

#endif
