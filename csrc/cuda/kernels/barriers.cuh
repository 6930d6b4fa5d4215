// Order between workers: the grid barrier of a single launch, and the ticket that finds the last to finish.
// Both leave their counters at zero, so a workspace is cleared once and not for every launch.
#pragma once

#include "ptx.cuh"

namespace resnet_fused::cuda {

// Waits for every worker of a cooperative launch. What they wrote before the barrier is visible after it.
// Worker 0 adds 2^31 - (workers - 1), every other 1: the sign flips when all have come, and the rest is zero again.
DEVICE void grid_barrier(int32_t* counter) {
  sync_threads();
  if (thread_index() == 0 && worker_count() > 1) {
    fence();
    const uint32_t step = worker_index() == 0 ? 0x80000000u - static_cast<uint32_t>(worker_count() - 1) : 1u;
    const int32_t before = atomic_add(counter, static_cast<int32_t>(step));
    while ((load_acquire(counter) ^ before) >= 0) {
    }
    fence();
  }
  sync_threads();
}

// Whether this worker is the last of `expected` to arrive here; if so, it sees what the others wrote before.
// flag: shared memory of the worker, free until its next barrier.
DEVICE bool arrives_last(int32_t* ticket, int expected, int32_t* flag) {
  sync_threads();
  if (thread_index() == 0) {
    fence();
    const bool last = atomic_add(ticket, 1) == expected - 1;
    if (last) *ticket = 0;
    fence();
    *flag = last;
  }
  sync_threads();
  return *flag != 0;
}

}  // namespace resnet_fused::cuda
