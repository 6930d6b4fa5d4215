"""Order between workers: the grid barrier of a single launch, and the ticket that finds the last to finish.

Both leave their counters at zero, so a workspace is cleared once and not for every launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grid_barrier(counter):
    """Waits for every worker of a cooperative launch. What they wrote before the barrier is visible after it.

    counter: int32 [1]. Worker 0 adds 2^31 - (workers - 1), every other worker 1: the sign flips when all have arrived,
    and the other bits are zero again.
    """
    workers = tl.num_programs(0)
    if workers > 1:
        tl.debug_barrier()  # the whole worker's stores come before its arrival
        step = tl.where(tl.program_id(0) == 0, (2147483647 - workers) + 2, 1)
        before = tl.atomic_add(counter, step, sem="acq_rel", scope="gpu")
        while (tl.atomic_add(counter, 0, sem="acquire", scope="gpu") ^ before) >= 0:
            pass
        tl.debug_barrier()


@triton.jit
def arrives_last(ticket, expected):
    """Whether this worker is the last of `expected` to arrive; if so, it sees the others' writes. ticket: int32 [1]."""
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = arrived == expected - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last
