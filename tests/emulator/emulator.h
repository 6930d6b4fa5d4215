// The functions of csrc/cuda/kernels/ptx.cuh for a CPU, and `emulator::run`, which runs a kernel with one fiber per
// thread.
//
// ptx.cuh includes this file, after scalars.cuh, where the compiler is not nvcc. What it shows and what not: README.md.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <bit>
#include <exception>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#define DEVICE inline
#define NOINLINE_DEVICE inline __attribute__((noinline))
#define UNROLL

#pragma GCC visibility push(hidden)

namespace resnet_fused::cuda {

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float v) { return std::bit_cast<uint32_t>(v); }

namespace emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr unsigned char kPoison = 0xff;  // NaN in every type
constexpr unsigned char kCanary = 0xa5;
constexpr size_t kCanaryBytes = RESNET_FUSED_EMULATOR_ASAN ? 0 : 256;  // AddressSanitizer has better ones
constexpr size_t kSharedAlignment = 128;
constexpr uint64_t kSpinTurns = 20000;  // of each living thread, before the spinning counts as endless

constexpr uint64_t kIdlePatience = 32;  // turns that only look at a counter, before others are chosen

// What a thread waits for, or is.
enum class At : uint8_t { running, barrier, ldmatrix, ldmatrix_transposed, mma_bf16, mma_f16, mma_tf32, finished };
constexpr int kAtCount = 8;

inline const char* name_of(At at) {
  constexpr const char* names[kAtCount] = {"running",        "at sync_threads", "at ldmatrix", "at ldmatrix_transposed",
                                           "at mma of bf16", "at mma of f16",   "at mma_tf32", "finished"};
  return names[static_cast<int>(at)];
}

// An asynchronous copy in flight.
struct Copy {
  char* to;
  const void* from;
  uint64_t group;
  bool inside;
  bool read;  // already, into `bytes`
  char bytes[16];
};

struct Warp {
  uint32_t runnable = 0;  // a bit per lane
  uint32_t arrived = 0;   // at `operation`
  At operation = At::running;
  int worker = 0;
  int first = 0;      // thread, of lane 0
  int lanes = 0;      // 32 but for the last warp of a worker
  int position = -1;  // in `State::active`
  // What the lanes bring to a warp operation and take away from it. A lane uses nothing but its own row, so that the
  // others may already bring their next.
  alignas(16) uint32_t a[kLanes][4];
  alignas(16) float c[kLanes][4];
  uint32_t b[kLanes][2];
  const char* row[kLanes];
};

struct Worker {
  int waiting = 0;  // at sync_threads
  int finished = 0;
  char* shared = nullptr;
};

struct Fiber {
  Context context;
  int thread = 0;
  int worker_index = 0;
  uint32_t lane = 0;
  At at = At::running;
  Warp* warp = nullptr;
  Worker* worker = nullptr;
  // Copies in flight, the oldest at `next_copy`; `groups` have been committed.
  std::vector<Copy> copies;
  size_t next_copy = 0;
  uint64_t groups = 0;
};

// Which warps get their turns. A missing barrier shows when somebody is far ahead of the others or far behind them,
// which picking evenly from all would hardly ever bring about.
enum class Policy : uint8_t { anyone, one_warp, one_worker, all_but_one_warp, all_but_one_worker };
constexpr uint32_t kPolicyCount = 5;

struct State {
  Fiber* current = nullptr;
  uint64_t random = 0;
  Policy policy = Policy::anyone;
  uint32_t turns = 0;  // left under `policy`
  Warp* chosen = nullptr;
  std::vector<Warp*> active;  // the warps with a runnable lane
  uint64_t idle = 0;          // turns in a row that did nothing but look at a counter
  uint64_t idle_limit = 0;

  int workers = 0;
  int threads = 0;
  int warps = 0;  // of a worker
  size_t shared_bytes = 0;
  int living = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  bool failed = false;
  std::string failure;

  Context main;
  std::vector<Fiber> fibers;
  std::vector<Warp> warp;
  std::vector<Worker> worker;
  Stacks stacks;
  std::mutex mutex;  // launches from several OS threads take turns
};
inline State state;

// --- scheduling ------------------------------------------------------------------------------------------------------

inline uint64_t random_bits() {  // splitmix64
  uint64_t z = state.random += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// From 0 to count - 1, made of the upper half of `bits`.
inline size_t random_below(uint64_t bits, size_t count) { return static_cast<size_t>(((bits >> 32) * count) >> 32); }

// Where everybody is: "worker 0: 255 at sync_threads, 1 finished; ...".
inline std::string whereabouts() {
  std::string text;
  for (int worker = 0; worker < state.workers; ++worker) {
    if (worker == 8) return text + "; ...";
    int count[kAtCount] = {};
    for (int i = 0; i < state.threads; ++i) {
      ++count[static_cast<int>(state.fibers[static_cast<size_t>(worker * state.threads + i)].at)];
    }
    text += (worker > 0 ? "; worker " : "worker ") + std::to_string(worker) + ":";
    const char* separator = " ";
    for (int at = 0; at < kAtCount; ++at) {
      if (count[at] == 0) continue;
      text += separator + std::to_string(count[at]) + " " + name_of(static_cast<At>(at));
      separator = ", ";
    }
  }
  return text;
}

// Keeps the message for `run` to throw.
__attribute__((noinline)) inline void record(std::initializer_list<const char*> parts) {
  const Fiber& self = *state.current;
  state.failed = true;
  state.failure = "worker " + std::to_string(self.worker_index) + ", thread " + std::to_string(self.thread) + ": ";
  for (const char* part : parts) state.failure += part;
  state.failure += " (" + whereabouts() + ")";
}

// Gives the launch up. The fibers' frames are not unwound: they must own nothing.
[[noreturn]] inline void abandon() { leave(state.current->context, state.main); }

[[noreturn]] __attribute__((noinline, cold)) inline void fail(std::initializer_list<const char*> parts) {
  record(parts);
  abandon();
}

inline void activate(Warp& warp) {
  if (warp.position >= 0) return;
  warp.position = static_cast<int>(state.active.size());
  state.active.push_back(&warp);
}

inline void deactivate(Warp& warp) {
  Warp* last = state.active.back();
  state.active[static_cast<size_t>(warp.position)] = last;
  last->position = warp.position;
  state.active.pop_back();
  warp.position = -1;
}

inline void choose_policy() {
  const uint64_t bits = random_bits();
  state.policy = static_cast<Policy>(bits % kPolicyCount);
  state.chosen = state.active[random_below(bits, state.active.size())];
  // As often for a few turns as for thousands.
  const uint64_t more = random_bits();
  state.turns = 1 + (static_cast<uint32_t>(more) & ((2u << random_below(more, 14)) - 1));
}

// Whose turn it is; somebody must be runnable.
inline Fiber* pick() {
  if (state.turns == 0) choose_policy();
  --state.turns;
  const uint64_t bits = random_bits();
  const size_t count = state.active.size();
  const size_t start = random_below(bits, count);
  Warp* warp = nullptr;
  switch (state.policy) {
    case Policy::anyone:
      warp = state.active[start];
      break;
    case Policy::one_warp:
      if (state.chosen->runnable != 0) warp = state.chosen;
      break;
    default: {
      for (size_t i = 0; i < count && warp == nullptr; ++i) {
        Warp* candidate = state.active[start + i < count ? start + i : start + i - count];
        const bool same_worker = candidate->worker == state.chosen->worker;
        const bool fits = state.policy == Policy::one_worker           ? same_worker
                          : state.policy == Policy::all_but_one_worker ? !same_worker
                                                                       : candidate != state.chosen;
        if (fits) warp = candidate;
      }
    }
  }
  if (warp == nullptr) {
    choose_policy();
    warp = state.active[start];
  }
  const int rotation = static_cast<int>(bits & 31);
  const int lane = (std::countr_zero(std::rotr(warp->runnable, rotation)) + rotation) & 31;
  return &state.fibers[static_cast<size_t>(warp->worker * state.threads + warp->first + lane)];
}

inline void give_turn() {
  Fiber* self = state.current;
  Fiber* next = pick();
  if (next == self) return;
  state.current = next;
  change(self->context, next->context);
}

// Lets others run; `idle`: the thread only looked at a counter, which it may be doing for ever.
__attribute__((noinline)) inline void yield(bool idle) {
  if (!idle) {
    state.idle = 0;
  } else {
    if (++state.idle > state.idle_limit) {
      fail({"spins for ever: for a long time no thread has done more than look at a counter"});
    }
    if (state.idle % kIdlePatience == 0) state.turns = 0;
  }
  give_turn();
}

// Takes the running thread out of the runnable ones.
inline void suspend(At at) {
  Fiber& self = *state.current;
  state.idle = 0;
  self.at = at;
  self.warp->runnable &= ~(1u << self.lane);
  if (self.warp->runnable == 0) deactivate(*self.warp);
}

inline void block(At at) {
  suspend(at);
  if (state.active.empty()) fail({"no thread can go on: each waits for another"});
  give_turn();
}

inline void wake(Warp& warp) {
  warp.runnable = warp.lanes == kLanes ? kAllLanes : (1u << warp.lanes) - 1;
  Fiber* first = &state.fibers[static_cast<size_t>(warp.worker * state.threads + warp.first)];
  for (int lane = 0; lane < warp.lanes; ++lane) first[lane].at = At::running;
  activate(warp);
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

inline void complete_copies(Fiber& fiber, uint64_t groups) {
  while (fiber.next_copy < fiber.copies.size()) {
    const Copy& copy = fiber.copies[fiber.next_copy];
    if (copy.group >= groups) break;
    if (!copy.inside) {
      memset(copy.to, 0, 16);
    } else {
      memcpy(copy.to, copy.read ? copy.bytes : copy.from, 16);
    }
    ++fiber.next_copy;
  }
  if (fiber.next_copy == fiber.copies.size()) {
    fiber.copies.clear();
    fiber.next_copy = 0;
  } else if (fiber.next_copy >= 64) {
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(fiber.next_copy));
    fiber.next_copy = 0;
  }
}

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Fails unless `address` is that of 16 bytes in the worker's shared memory.
inline void check_shared(const char* what, const void* address) {
  if (!aligned(address)) fail({what, ": the address in shared memory is not a multiple of 16"});
  const auto begin = reinterpret_cast<uintptr_t>(state.current->worker->shared);
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at < begin || at + 16 > begin + state.shared_bytes) fail({what, ": not in the worker's shared memory"});
}

// --- warp operations -------------------------------------------------------------------------------------------------

using Words4 = uint32_t __attribute__((vector_size(16)));
using Floats4 = float __attribute__((vector_size(16)));
using Doubles4 = double __attribute__((vector_size(32)));
using Doubles2 = double __attribute__((vector_size(16)));

inline Words4 load_words(const uint32_t* from) {
  Words4 words;
  memcpy(&words, from, sizeof(words));
  return words;
}

// Four 16-bit numbers, in the lower halves of the words.
inline Floats4 widen(Words4 bits, bf16) {
  const Words4 wide = bits << 16;
  return std::bit_cast<Floats4>(wide);
}
inline Floats4 widen(Words4 bits, f16) {
  const Words4 magnitude = bits & 0x7fff;
  const Words4 sign = (bits & 0x8000) << 16;
  const Words4 normal = (magnitude << 13) + (112u << 23);
  const Words4 special = normal + (112u << 23);  // infinite or NaN
  const Floats4 small =
      __builtin_convertvector(std::bit_cast<int32_t __attribute__((vector_size(16)))>(magnitude), Floats4) * 0x1p-24f;
  // vector comparisons give all ones where true
  const Words4 is_small = std::bit_cast<Words4>(magnitude < 0x400);
  const Words4 is_special = std::bit_cast<Words4>(magnitude >= 0x7c00);
  const Words4 wide =
      (is_small & std::bit_cast<Words4>(small)) | (is_special & special) | (~(is_small | is_special) & normal);
  return std::bit_cast<Floats4>(wide | sign);
}

template <int K>
struct Fragments {
  double a[16][K];
  alignas(16) double b[K][8];
};

// c += a b. The products are exact; their sum with c is rounded to a float once.
template <int K>
inline void multiply(Warp& warp, const Fragments<K>& f) {
  for (int row = 0; row < 16; ++row) {
    Doubles2 sum[4];
    for (int t = 0; t < 4; ++t) {
      const float* c = &warp.c[row % 8 * 4 + t][row / 8 * 2];
      sum[t] = Doubles2{c[0], c[1]};
    }
    for (int k = 0; k < K; ++k) {
      const double left = f.a[row][k];
      const Doubles2* right = reinterpret_cast<const Doubles2*>(f.b[k]);
      sum[0] += left * right[0];
      sum[1] += left * right[1];
      sum[2] += left * right[2];
      sum[3] += left * right[3];
    }
    for (int t = 0; t < 4; ++t) {
      float* c = &warp.c[row % 8 * 4 + t][row / 8 * 2];
      c[0] = static_cast<float>(sum[t][0]);
      c[1] = static_cast<float>(sum[t][1]);
    }
  }
}

template <class Element>
inline void multiply_16_bit(Warp& warp) {
  Fragments<16> f;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Words4 a = load_words(warp.a[lane]);
    const Words4 b = {warp.b[lane][0], warp.b[lane][1], 0, 0};
    for (int half = 0; half < 2; ++half) {
      const Floats4 wide = widen(half == 0 ? a & 0xffff : a >> 16, Element{});
      f.a[g][2 * t + half] = wide[0];
      f.a[g + 8][2 * t + half] = wide[1];
      f.a[g][2 * t + 8 + half] = wide[2];
      f.a[g + 8][2 * t + 8 + half] = wide[3];
      const Floats4 right = widen(half == 0 ? b & 0xffff : b >> 16, Element{});
      f.b[2 * t + half][g] = right[0];
      f.b[2 * t + 8 + half][g] = right[1];
    }
  }
  multiply(warp, f);
}

inline void multiply_tf32(Warp& warp) {
  const auto widen_tf32 = [](uint32_t bits) { return static_cast<double>(float_of(bits & ~0x1fffu)); };
  Fragments<8> f;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    f.a[g][t] = widen_tf32(warp.a[lane][0]);
    f.a[g + 8][t] = widen_tf32(warp.a[lane][1]);
    f.a[g][t + 4] = widen_tf32(warp.a[lane][2]);
    f.a[g + 8][t + 4] = widen_tf32(warp.a[lane][3]);
    f.b[t][g] = widen_tf32(warp.b[lane][0]);
    f.b[t + 4][g] = widen_tf32(warp.b[lane][1]);
  }
  multiply(warp, f);
}

inline void load_matrices(Warp& warp, bool transposed) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      if (!transposed) {
        memcpy(&warp.a[lane][i], warp.row[8 * i + g] + 4 * t, 4);
      } else {
        uint16_t pair[2];
        memcpy(&pair[0], warp.row[8 * i + 2 * t] + 2 * g, 2);
        memcpy(&pair[1], warp.row[8 * i + 2 * t + 1] + 2 * g, 2);
        memcpy(&warp.a[lane][i], pair, 4);
      }
    }
  }
}

// The lanes of a warp have brought their operands; the last of them does the work of all.
__attribute__((noinline)) inline void meet(At operation) {
  Fiber& self = *state.current;
  Warp& warp = *self.warp;
  if (warp.lanes != kLanes) fail({name_of(operation), " in a warp of fewer than 32 threads"});
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation) {
    fail(
        {name_of(operation), " while other lanes of the warp are ", name_of(warp.operation),
         ": the lanes are not all at the same warp operation"});
  }
  warp.arrived |= 1u << self.lane;
  if (warp.arrived != kAllLanes) {
    block(operation);
    return;
  }
  switch (operation) {
    case At::ldmatrix:
      load_matrices(warp, false);
      break;
    case At::ldmatrix_transposed:
      load_matrices(warp, true);
      break;
    case At::mma_bf16:
      multiply_16_bit<bf16>(warp);
      break;
    case At::mma_f16:
      multiply_16_bit<f16>(warp);
      break;
    default:
      multiply_tf32(warp);
  }
  warp.arrived = 0;
  wake(warp);
  yield(false);
}

// --- launches --------------------------------------------------------------------------------------------------------

[[noreturn]] inline void finish() {
  Fiber& self = *state.current;
  complete_copies(self, ~uint64_t{0});
  suspend(At::finished);
  ++self.worker->finished;
  --state.living;
  if (self.worker->waiting > 0) fail({"has returned while other threads of its worker wait at sync_threads"});
  if (self.warp->arrived != 0) {
    fail(
        {"has returned while other lanes of its warp are ", name_of(self.warp->operation),
         ": the lanes are not all at the same warp operation"});
  }
  if (state.living == 0) leave(self.context, state.main);
  if (state.active.empty()) fail({"no thread can go on: each waits for another"});
  Fiber* next = pick();
  state.current = next;
  leave(self.context, next->context);
}

inline void enter() {
  arrive(state.main);
  try {
    state.body(state.argument);
  } catch (const std::exception& error) {
    record({"has thrown: ", error.what()});
  } catch (...) {
    record({"has thrown something that is not a std::exception"});
  }
  if (state.failed) abandon();  // not from within the handler, which has to be left in order
  finish();
}

inline void check_canaries(const char* shared, int worker) {
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    const bool before = i < kCanaryBytes / 2;
    const char* at = before ? shared - kCanaryBytes / 2 + i : shared + state.shared_bytes + i - kCanaryBytes / 2;
    if (static_cast<unsigned char>(*at) == kCanary) continue;
    throw std::runtime_error(
        "worker " + std::to_string(worker) + " has written " + (before ? "before" : "beyond") +
        " its shared memory, at byte " + std::to_string(at - shared) + " of " + std::to_string(state.shared_bytes));
  }
}

// Runs body(argument) once per thread. Throws std::runtime_error when it cannot go on: threads of a worker left while
// others wait at sync_threads, lanes that are not all at the same warp operation, or nothing but spinning for ever.
inline void run(
    int workers, int threads, size_t shared_bytes, uint64_t seed, void (*body)(const void*), const void* argument) {
  if (workers < 1 || threads < 1) throw std::invalid_argument("a launch needs at least one worker of one thread");
  const std::lock_guard lock(state.mutex);
  const int count = workers * threads;
  state.random = seed;
  state.turns = 0;
  state.chosen = nullptr;
  state.active.clear();
  state.idle = 0;
  state.idle_limit = kSpinTurns * static_cast<uint64_t>(count);
  state.workers = workers;
  state.threads = threads;
  state.warps = (threads + kLanes - 1) / kLanes;
  state.shared_bytes = shared_bytes;
  state.living = count;
  state.body = body;
  state.argument = argument;
  state.failed = false;
  state.failure.clear();
  state.main.stack = nullptr;

  struct Release {
    void operator()(char* memory) const { free(memory); }
  };
  std::vector<std::unique_ptr<char, Release>> shared;
  state.worker.assign(static_cast<size_t>(workers), Worker());
  for (Worker& worker : state.worker) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kSharedAlignment, shared_bytes + kCanaryBytes) != 0) throw std::bad_alloc();
    shared.emplace_back(static_cast<char*>(memory));
    memset(memory, kCanary, shared_bytes + kCanaryBytes);
    worker.shared = static_cast<char*>(memory) + kCanaryBytes / 2;
    memset(worker.shared, kPoison, shared_bytes);
  }

  state.stacks.reserve(count);
  if (state.fibers.size() < static_cast<size_t>(count)) state.fibers = std::vector<Fiber>(static_cast<size_t>(count));
  state.warp.assign(static_cast<size_t>(workers * state.warps), Warp());
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = state.fibers[static_cast<size_t>(i)];
    fiber.worker_index = i / threads;
    fiber.thread = i % threads;
    fiber.lane = static_cast<uint32_t>(fiber.thread % kLanes);
    fiber.worker = &state.worker[static_cast<size_t>(fiber.worker_index)];
    fiber.warp = &state.warp[static_cast<size_t>(fiber.worker_index * state.warps + fiber.thread / kLanes)];
    fiber.warp->worker = fiber.worker_index;
    fiber.warp->first = fiber.thread - static_cast<int>(fiber.lane);
    ++fiber.warp->lanes;
    fiber.copies.clear();
    fiber.next_copy = 0;
    fiber.groups = 0;
    prepare(fiber.context, state.stacks.bottom(i), Stacks::bytes(i), enter);
  }
  for (Warp& warp : state.warp) wake(warp);

  state.current = pick();
  change(state.main, state.current->context);
  state.current = nullptr;
  if (state.failed) throw std::runtime_error(state.failure);
  for (int i = 0; i < workers; ++i) check_canaries(state.worker[static_cast<size_t>(i)].shared, i);
}

}  // namespace emulator

// --- what ptx.cuh gives a kernel -------------------------------------------------------------------------------------

inline int thread_index() { return emulator::state.current->thread; }
inline int worker_index() { return emulator::state.current->worker_index; }
inline int worker_count() { return emulator::state.workers; }
inline char* shared_memory() { return emulator::state.current->worker->shared; }

__attribute__((noinline)) inline void sync_threads() {
  using namespace emulator;
  Worker& worker = *state.current->worker;
  if (worker.finished > 0) fail({"waits at sync_threads after other threads of its worker have returned"});
  if (++worker.waiting < state.threads) {
    block(At::barrier);
    return;
  }
  worker.waiting = 0;
  const int first = state.current->worker_index * state.warps;
  for (int i = 0; i < state.warps; ++i) wake(state.warp[static_cast<size_t>(first + i)]);
  yield(false);
}

// The destination is poisoned until the copy is waited for. A GPU may read the source at any time until then: some
// copies read it at once, which shows sources that are not written yet, and some as late as can be, which shows those
// overwritten.
__attribute__((noinline)) inline void cp_async_16(void* shared, const void* global, bool inside) {
  using namespace emulator;
  Fiber& self = *state.current;
  check_shared("cp_async_16", shared);
  if (!aligned(global)) fail({"cp_async_16: the address in global memory is not a multiple of 16"});
  const uint64_t bits = random_bits();
  Copy copy = {static_cast<char*>(shared), global, self.groups, inside, inside && (bits & 8) != 0, {}};
  if (copy.read) memcpy(copy.bytes, global, 16);
  memset(shared, kPoison, 16);
  self.copies.push_back(copy);
  if ((bits & 7) == 0) yield(false);
}

inline void cp_async_commit() {
  ++emulator::state.current->groups;
  if ((emulator::random_bits() & 7) == 0) emulator::yield(false);
}

template <int N>
inline void cp_async_wait() {
  emulator::Fiber& self = *emulator::state.current;
  if (self.groups > N) emulator::complete_copies(self, self.groups - N);
}

inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  using namespace emulator;
  const Fiber& self = *state.current;
  check_shared("ldmatrix", row);
  self.warp->row[self.lane] = static_cast<const char*>(row);
  meet(At::ldmatrix);
  memcpy(r, self.warp->a[self.lane], sizeof(r));
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  using namespace emulator;
  const Fiber& self = *state.current;
  check_shared("ldmatrix_transposed", row);
  self.warp->row[self.lane] = static_cast<const char*>(row);
  meet(At::ldmatrix_transposed);
  memcpy(r, self.warp->a[self.lane], sizeof(r));
}

namespace emulator {
inline void multiply_add(At operation, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fiber& self = *state.current;
  Warp& warp = *self.warp;
  memcpy(warp.a[self.lane], a, sizeof(a));
  memcpy(warp.c[self.lane], c, sizeof(c));
  warp.b[self.lane][0] = b0;
  warp.b[self.lane][1] = b1;
  meet(operation);
  memcpy(c, warp.c[self.lane], sizeof(c));
}
}  // namespace emulator

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  emulator::multiply_add(emulator::At::mma_bf16, c, a, b0, b1);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  emulator::multiply_add(emulator::At::mma_f16, c, a, b0, b1);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_add(emulator::At::mma_tf32, c, a, b0, b1);
}

// NaN becomes the one NaN that a GPU's conversions give.
inline uint32_t to_tf32(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline uint64_t multiply_wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

inline float to_float(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(f16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude < 0x400u) return float_of(bits_of(static_cast<float>(magnitude) * 0x1p-24f) | sign);
  return float_of(((magnitude << 13) + ((magnitude < 0x7c00u ? 112u : 224u) << 23)) | sign);
}
inline bf16 to_bf16(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline f16 to_f16(float v) {
  const uint32_t bits = bits_of(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t narrow;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) {  // 65520, the tie between the largest number and the next
    narrow = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal, multiples of 2^-24, which is what 0.5f counts in
    narrow = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    narrow = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(narrow | sign)};
}

// Both are where a thread may be waiting for others. Whether they get their turn before or after is legal either way.
inline int atomic_add(int* counter, int value) {
  const bool later = (emulator::random_bits() & 1) != 0;
  if (!later) emulator::yield(value == 0);
  const int before = *counter;
  *counter = before + value;
  if (later) emulator::yield(value == 0);
  return before;
}
inline int load_acquire(const int* counter) {
  const bool later = (emulator::random_bits() & 1) != 0;
  if (!later) emulator::yield(true);
  const int value = *counter;
  if (later) emulator::yield(true);
  return value;
}
inline void fence() {
  // not progress: it may stand in a loop that spins
  if ((emulator::random_bits() & 7) == 0) emulator::give_turn();
}

}  // namespace resnet_fused::cuda

#pragma GCC visibility pop
