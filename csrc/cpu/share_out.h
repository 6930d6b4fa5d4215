// Loops whose threads help each other: on a machine that others use cores are not equally fast, and jobs are not
// equally long.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>

namespace resnet_fused::cpu {

// Neighbouring jobs that nobody has begun. Their own thread takes the first of them, others take the last.
class alignas(64) Jobs {
 public:
  void set(int64_t begin, int64_t end) {
    left_.store(static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end), std::memory_order_relaxed);
  }
  // -1: none is left
  int64_t take(bool first) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = left >> 32, end = left & 0xffffffff;
      if (begin >= end) return -1;
      const uint64_t rest = first ? left + (uint64_t{1} << 32) : left - 1;
      if (left_.compare_exchange_weak(left, rest, std::memory_order_relaxed))
        return static_cast<int64_t>(first ? begin : end - 1);
    }
  }

 private:
  std::atomic<uint64_t> left_{0};
};

// Runs start(thread) on each thread, then what it returned for one job of [0, count) after the other. A thread begins
// with neighbouring jobs of its own, the same at each call, and afterwards helps others. What a job writes must not
// depend on who runs it.
template <class Start>
void share_out(int64_t count, const Start& start) {
  TORCH_INTERNAL_ASSERT(count <= std::numeric_limits<int32_t>::max());
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(count, at::get_num_threads());
  if (threads < 1) return;
  const std::unique_ptr<Jobs[]> jobs(new Jobs[threads]);
  for (int64_t t = 0; t < threads; ++t) jobs[t].set(t * count / threads, (t + 1) * count / threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      auto run = start(thread);
      for (int64_t other = 0; other < threads; ++other)
        for (int64_t job; (job = jobs[(thread + other) % threads].take(other == 0)) >= 0;) run(job);
    }
  });
}

// The same where threads have nothing of their own.
template <class Run>
void for_each_job(int64_t count, const Run& run) {
  share_out(count, [&](int64_t) -> const Run& { return run; });
}

}  // namespace resnet_fused::cpu
