// What the C library does with memory that training frees.
#pragma once

namespace resnet_fused::cpu {

// Has glibc keep up to 64 MiB at the end of its heap instead of giving them back to the system: the most that it ever
// comes to by itself. Once a process; nothing where the thresholds are set (MALLOC_*, mallopt) or with another
// allocator.
//
// It gives back what exceeds twice the largest block below 32 MiB that it has mapped and freed (mallopt(3),
// M_MMAP_THRESHOLD). In batches of a few pictures no tensor is large, and a training step of ResNet-50 touched 10 to
// 130 MB afresh, by chance of what lies where: up to 8 % of its time (docs/performance.md).
void keep_freed_memory();

}  // namespace resnet_fused::cpu
