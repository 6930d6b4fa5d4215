#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(RESNET_FUSED_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_portable"};

#if defined(RESNET_FUSED_X86)
// Linux gives a process the tile registers only on request.
bool has_tiles() {
#if defined(__linux__)
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if ((d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

Isa best() {
#if defined(RESNET_FUSED_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return has_tiles() ? Isa::amx : Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

const char* wished() {
  const char* wish = std::getenv("RESNET_FUSED_ISA");
  return wish && *wish ? wish : nullptr;
}

Isa detect() {
  const Isa found = best();
  const char* wish = wished();
  if (!wish) return found;
  std::string accepted;
  for (int i = 0; i <= static_cast<int>(Isa::amx_portable); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa > found && isa != Isa::amx_portable) continue;
    if (std::strcmp(wish, kNames[i]) == 0) return isa;
    accepted += (accepted.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  TORCH_CHECK_VALUE(
      false, "RESNET_FUSED_ISA is \"", wish, "\"; accepted on this processor: ", accepted, ", or leave it unset");
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

Isa vector_isa() {
  static const Isa chosen = isa() == Isa::amx_portable ? best() : isa();
  return chosen;
}

bool has_slow_pairs() {
#if defined(RESNET_FUSED_X86)
  static const bool slow = __builtin_cpu_is("intel");
  return slow;
#else
  return false;
#endif
}

bool is_forced() {
  static const bool forced = wished() != nullptr;
  return forced;
}

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace resnet_fused::cpu
