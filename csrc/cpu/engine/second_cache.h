// How large a core's second cache is.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace resnet_fused::cpu::engine {

inline int64_t second_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (told > 0) return told;
#endif
  return int64_t{1} << 20;
}

}  // namespace resnet_fused::cpu::engine
