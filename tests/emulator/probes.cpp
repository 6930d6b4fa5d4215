// Small kernels that try the emulator out, one exported function a question; tests/cuda/test_emulator.py asks them.
//
// Each function returns the error of its launch, or an empty string.

#include <stdio.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "../../csrc/cuda/kernels/ptx.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace resnet_fused::cuda;

namespace {

template <class Kernel>
const char* launch(int workers, int threads, size_t shared_bytes, uint64_t seed, const Kernel& kernel) {
  static std::string error;
  error.clear();
  try {
    emulator::run(
        workers, threads, shared_bytes, seed, [](const void* body) { (*static_cast<const Kernel*>(body))(); }, &kernel);
  } catch (const std::runtime_error& caught) {
    error = caught.what();
  }
  return error.c_str();
}

template <class T>
T* shared_array() {
  return reinterpret_cast<T*>(shared_memory());
}

// Every worker of the launch comes here before any goes on; `counter` grows by the workers each time.
void grid_barrier(int* counter, int round) {
  sync_threads();
  if (thread_index() == 0) {
    fence();
    atomic_add(counter, 1);
    while (load_acquire(counter) < round * worker_count()) {
    }
  }
  sync_threads();
}

template <class Element>
void multiply_16_bit(const uint16_t* a, const uint16_t* b, const float* c, float* out) {
  const int g = thread_index() / 4, t = thread_index() % 4;
  const auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* from = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    left[i] = pair(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) right[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 1 + 8 * i) * 8 + g]);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma(sum, left, right[0], right[1], Element{});
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

void multiply_tf32(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int g = thread_index() / 4, t = thread_index() % 4;
  uint32_t left[4];
  for (int i = 0; i < 4; ++i) left[i] = a[(g + i % 2 * 8) * 8 + t + i / 2 * 4];
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_tf32(sum, left, b[t * 8 + g], b[(t + 4) * 8 + g]);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

}  // namespace

// --- one primitive each ----------------------------------------------------------------------------------------------

EXPORT void float_to_bf16(const float* from, uint16_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = to_bf16(from[i]).bits;
}
EXPORT void float_to_f16(const float* from, uint16_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = to_f16(from[i]).bits;
}
EXPORT void float_to_tf32(const float* from, uint32_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = to_tf32(from[i]);
}
EXPORT void bf16_to_float(const uint16_t* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = to_float(bf16{from[i]});
}
EXPORT void f16_to_float(const uint16_t* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = to_float(f16{from[i]});
}
EXPORT uint64_t product(uint32_t a, uint32_t b) { return multiply_wide(a, b); }
EXPORT uint32_t there_and_back(uint32_t bits) { return bits_of(float_of(bits)); }

// Where a thread is, as 1000 worker + thread, from every thread; and the sum of the worker counts that they see.
EXPORT const char* indices(int workers, int threads, int* place, int* total) {
  return launch(workers, threads, 0, 1, [=] {
    place[worker_index() * threads + thread_index()] = 1000 * worker_index() + thread_index();
    atomic_add(total, worker_count());
  });
}

// out [16, 8] = a [16, k] b [k, 8] + c, elements as bits, 4 bytes each for tf32, otherwise 2.
EXPORT const char* matrix_product(int kind, const void* a, const void* b, const float* c, float* out, uint64_t seed) {
  return launch(1, 32, 0, seed, [=] {
    const auto* a_16 = static_cast<const uint16_t*>(a);
    const auto* b_16 = static_cast<const uint16_t*>(b);
    if (kind == 0) {
      multiply_16_bit<bf16>(a_16, b_16, c, out);
    } else if (kind == 1) {
      multiply_16_bit<f16>(a_16, b_16, c, out);
    } else {
      multiply_tf32(static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), c, out);
    }
  });
}

// registers [32, 4] of a warp that loads matrices [4, 8, 8].
EXPORT const char* load_matrices(bool transposed, const uint16_t* matrices, uint32_t* registers, uint64_t seed) {
  return launch(1, 32, 512, seed, [=] {
    auto* shared = shared_array<uint16_t>();
    const int lane = thread_index();
    memcpy(shared + 8 * lane, matrices + 8 * lane, 16);
    sync_threads();
    uint32_t r[4];
    if (transposed) {
      ldmatrix_transposed(r, shared + 8 * lane);
    } else {
      ldmatrix(r, shared + 8 * lane);
    }
    memcpy(registers + 4 * lane, r, 16);
  });
}

// Three groups of copies of 16 bytes into shared memory, the last never committed: what lies there at first, after a
// wait that leaves one group in flight, and after one that leaves none: seen [3, 3, 4]. Group 1 is outside, its source
// unreadable.
EXPORT const char* copies(const uint32_t* source, uint32_t* seen, uint64_t seed) {
  return launch(1, 1, 48, seed, [=] {
    auto* shared = shared_array<uint32_t>();
    memset(shared, 0, 48);
    cp_async_16(shared, source, true);
    cp_async_commit();
    cp_async_16(shared + 4, reinterpret_cast<const void*>(16), false);
    cp_async_commit();
    cp_async_16(shared + 8, source + 4, true);
    memcpy(seen, shared, 48);
    cp_async_wait<1>();
    memcpy(seen + 12, shared, 48);
    cp_async_wait<0>();
    memcpy(seen + 24, shared, 48);
  });
}

// The shared memory of a worker as it finds it.
EXPORT const char* fresh_shared_memory(unsigned char* bytes, int count) {
  return launch(1, 1, static_cast<size_t>(count), 1, [=] {
    memcpy(bytes, shared_memory(), static_cast<size_t>(count));
    memset(shared_memory(), 0, static_cast<size_t>(count));
  });
}

// The order in which the threads get their first turns.
EXPORT const char* order(int workers, int threads, uint64_t seed, int* place) {
  int next = 0;
  return launch(workers, threads, 0, seed, [=, &next] { place[next++] = worker_index() * threads + thread_index(); });
}

// --- barriers, there and left out ------------------------------------------------------------------------------------

// The sum of 256 numbers in shared memory; `left_out`: which of the barriers is not there, the 8 steps' or the first's.
EXPORT const char* reduction(const float* in, float* out, uint64_t seed, int left_out) {
  return launch(1, 256, 1024, seed, [=] {
    auto* shared = shared_array<float>();
    const int thread = thread_index();
    shared[thread] = in[thread];
    if (left_out != 0) sync_threads();
    for (int step = 1, width = 128; width > 0; ++step, width /= 2) {
      if (thread < width) shared[thread] += shared[thread + width];
      if (left_out != step) sync_threads();
    }
    if (thread == 0) *out = shared[0];
  });
}

// out [steps] = the sums of in [steps, 128], read through two buffers; without `barrier` nothing keeps a fast warp
// from loading into a buffer that a slow one still reads.
EXPORT const char* double_buffer(int steps, const int* in, int* out, uint64_t seed, bool barrier) {
  return launch(1, 128, 1024, seed, [=] {
    auto* shared = shared_array<int>();
    const int thread = thread_index();
    const auto load = [&](int step) {
      if (step < steps && thread < 32)
        cp_async_16(shared + step % 2 * 128 + 4 * thread, in + step * 128 + 4 * thread, true);
      cp_async_commit();
    };
    load(0);
    for (int step = 0; step < steps; ++step) {
      load(step + 1);
      cp_async_wait<1>();
      sync_threads();
      const int* buffer = shared + step % 2 * 128;
      // another thread's number, so that all depends on the copies
      atomic_add(out + step, buffer[127 - thread]);
      if (barrier) sync_threads();
    }
  });
}

// Rounds in which each thread adds up what the same thread of all workers wrote in the round before: values [2,
// workers, threads]. The barrier is that of the whole launch, of the worker only (1), or not there (2).
EXPORT const char* grid(int workers, int threads, int rounds, int* values, uint64_t seed, int barrier) {
  int counter = 0;
  return launch(workers, threads, 0, seed, [=, &counter] {
    for (int round = 1; round <= rounds; ++round) {
      int sum = 0;
      const int* before = values + (round - 1) % 2 * workers * threads;
      for (int worker = 0; worker < workers; ++worker) sum += before[worker * threads + thread_index()];
      values[(round % 2 * workers + worker_index()) * threads + thread_index()] = sum;
      if (barrier == 0) grid_barrier(&counter, round);
      if (barrier == 1) sync_threads();
    }
  });
}

// The last worker to take a ticket adds up what all have written.
EXPORT const char* ticket(int workers, int threads, int* partials, int* total, uint64_t seed, bool barrier) {
  int tickets = 0;
  return launch(workers, threads, sizeof(int), seed, [=, &tickets] {
    const int place = worker_index() * threads + thread_index();
    partials[place] = place + 1;
    if (barrier) sync_threads();
    auto* last = shared_array<int>();
    if (thread_index() == 0) {
      fence();
      *last = atomic_add(&tickets, 1) == workers - 1;
    }
    sync_threads();
    if (*last != 0)
      atomic_add(total, [&] {
        int sum = 0;
        for (int worker = 0; worker < workers; ++worker) sum += partials[worker * threads + thread_index()];
        return sum;
      }());
  });
}

// A copy that is issued before the barrier behind which its source is written, by another worker.
EXPORT const char* early_copy(float* source, float* out, uint64_t seed) {
  int counter = 0;
  return launch(2, 32, 16 * 32, seed, [=, &counter] {
    auto* shared = shared_array<float>() + 4 * thread_index();
    if (worker_index() == 1) cp_async_16(shared, source + 4 * thread_index(), true);
    cp_async_commit();
    grid_barrier(&counter, 1);
    if (worker_index() == 0) source[4 * thread_index()] = 1;
    grid_barrier(&counter, 2);
    cp_async_wait<0>();
    if (worker_index() == 1) out[thread_index()] = shared[0];
  });
}

// --- what ends a launch ----------------------------------------------------------------------------------------------

EXPORT const char* mistake(const char* name, uint64_t seed) {
  const std::string which = name;
  alignas(16) float numbers[8] = {};
  const float* global = numbers;
  int counter = 0;
  return launch(
      2,
      which == "partial warp" ? 40
      : which == "spin"       ? 8
                              : 64,
      1024, seed, [=, &which, &counter] {
        const int thread = thread_index();
        float c[4] = {};
        uint32_t r[4] = {};
        char* shared = shared_memory();
        if (which == "none") {
          sync_threads();
        } else if (which == "returned before") {
          if (thread < 40) sync_threads();
        } else if (which == "divergent barrier") {
          if (thread % 2 == 0) sync_threads();
          mma(c, r, 0, 0, bf16{});
          if (thread % 2 == 1) sync_threads();
        } else if (which == "divergent warp") {
          if (thread % 2 == 0) {
            mma(c, r, 0, 0, bf16{});
          } else {
            mma(c, r, 0, 0, f16{});
          }
        } else if (which == "absent lane") {
          if (thread != 5) ldmatrix(r, shared);
        } else if (which == "partial warp") {
          mma_tf32(c, r, 0, 0);
        } else if (which == "spin") {
          if (thread == 0) atomic_add(&counter, 1);  // by both workers
          while (load_acquire(&counter) < 3) fence();
        } else if (which == "misaligned source") {
          cp_async_16(shared, global + 1, true);
        } else if (which == "misaligned destination") {
          cp_async_16(shared + 8, global, true);
        } else if (which == "misaligned row") {
          ldmatrix(r, shared + 2);
        } else if (which == "row outside") {
          ldmatrix(r, shared + 1024);
        } else if (which == "exception") {
          if (thread == 33) throw std::logic_error("a telling message");
          sync_threads();
        } else if (which == "overrun") {
          if (thread == 1) shared[1024 + 4 * worker_index()] = 0;
        } else {
          throw std::logic_error("no such mistake");
        }
      });
}

// For AddressSanitizer, which wants to be in a program from its start: launches that are right, that are given up, and,
// with an argument, one that writes beyond its shared memory.
int main(int argc, char**) {
  alignas(16) float numbers[256] = {}, source[128] = {};
  alignas(16) int values[4 * 128] = {};
  int sums[4] = {};
  for (uint64_t seed = 0; seed < 3; ++seed) {
    for (const char* name : {"exception", "divergent warp", "returned before"}) {
      if (*mistake(name, seed) == 0) return 2;
    }
    for (const char* error :
         {reduction(numbers, numbers, seed, -1), double_buffer(4, values, sums, seed, true),
          grid(3, 64, 3, values, seed, 0), early_copy(source, numbers, seed)}) {
      if (*error != 0) return printf("%s\n", error), 3;
    }
  }
  if (argc > 1) mistake("overrun", 1);
  return 0;
}
