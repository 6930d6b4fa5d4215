#include "heap.h"

#include <c10/core/CPUAllocator.h>

#if defined(__GLIBC__)
#include <malloc.h>

#include <cstdlib>
#include <cstring>
#endif

namespace resnet_fused::cpu {
namespace {

#if defined(__GLIBC__)
// glibc counts its own few bytes to the limit of 32 MiB. A block that no one touches costs two system calls.
constexpr size_t kLargest = (size_t{32} << 20) - (size_t{64} << 10);

int mapped_blocks() {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // mallinfo2 came with glibc 2.33
  return mallinfo().hblks;
#pragma GCC diagnostic pop
}

bool set_in_environment() {
  for (const char* name : {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_"})
    if (std::getenv(name)) return true;
  const char* tunables = std::getenv("GLIBC_TUNABLES");
  return tunables && std::strstr(tunables, "glibc.malloc.");
}

bool raise_thresholds() {
  if (set_in_environment()) return false;
  const auto allocate = [] { return c10::GetCPUAllocator()->allocate(kLargest); };
  allocate().clear();  // raises the threshold of mapping, unless it is set
  const int before = mapped_blocks();
  const auto block = allocate();
  const bool set_by_mallopt = mapped_blocks() > before;
  return !set_by_mallopt && mallopt(M_TRIM_THRESHOLD, -1) == 1;
}
#endif

}  // namespace

void keep_freed_memory() {
#if defined(__GLIBC__)
  [[maybe_unused]] static const bool once = raise_thresholds();
#endif
}

}  // namespace resnet_fused::cpu
