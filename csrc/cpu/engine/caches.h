// A core's caches.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace resnet_fused::cpu::engine {

// Bytes of the second.
inline int64_t second_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (told > 0) return told;
#endif
  return int64_t{1} << 20;
}

// How many lines of the first cache may lie a page apart, or at any multiple of it.
inline int64_t first_cache_ways() {
#ifdef _SC_LEVEL1_DCACHE_ASSOC
  static const int64_t told = sysconf(_SC_LEVEL1_DCACHE_ASSOC);
  if (told > 0) return told;
#endif
  return 8;
}

}  // namespace resnet_fused::cpu::engine
