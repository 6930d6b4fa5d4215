// What the C library does with memory that training frees.
#pragma once

namespace resnet_fused::cpu {

// Has glibc keep what is freed for the next step instead of giving it back to the system, and map only blocks of 32 MiB
// and more on their own, the most that it comes to by itself. Once a process; nothing where the thresholds are set
// (MALLOC_*, mallopt) or with another allocator. malloc_trim gives the memory back.
//
// By itself glibc gives back what exceeds twice the largest block below 32 MiB that it has mapped and freed
// (mallopt(3), M_MMAP_THRESHOLD), and a training step of ResNet-50 touches afresh up to a quarter of its memory, by
// chance of what lies where: 6 to 20 % of its time (docs/performance.md).
void keep_freed_memory();

}  // namespace resnet_fused::cpu
