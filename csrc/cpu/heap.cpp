#include "heap.h"

#include <c10/core/CPUAllocator.h>

namespace resnet_fused::cpu {

void keep_freed_memory() {
  // A block that no one touches costs two system calls; glibc counts its own few bytes to the limit of 32 MiB.
  [[maybe_unused]] static const bool once = [] {
    constexpr size_t largest = (size_t{32} << 20) - (size_t{64} << 10);
    c10::GetCPUAllocator()->allocate(largest).clear();
    return true;
  }();
}

}  // namespace resnet_fused::cpu
