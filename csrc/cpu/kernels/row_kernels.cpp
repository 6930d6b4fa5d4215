// Which instruction set's row kernels run: decided once, at the first call.
#include "row_kernels.h"

#include <cstdlib>
#include <cstring>

namespace resnet_fused::cpu {

#define DECLARE_TABLES(isa)                  \
  namespace isa {                            \
  const RowKernels<float>& kernels(float);   \
  const RowKernels<double>& kernels(double); \
  const RowKernels<bf16>& kernels(bf16);     \
  const RowKernels<f16>& kernels(f16);       \
  }
DECLARE_TABLES(baseline)
#if defined(__x86_64__)
DECLARE_TABLES(avx2)
DECLARE_TABLES(avx512)
#endif
#undef DECLARE_TABLES

namespace {

enum class Isa { baseline, avx2, avx512 };

Isa detect() {
#if defined(__x86_64__)
  const char* wish = std::getenv("RESNET_FUSED_ISA");
  const bool below_avx512 = wish && std::strcmp(wish, "avx512") != 0;
  const bool below_avx2 = below_avx512 && std::strcmp(wish, "avx2") != 0;
  if (!below_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (!below_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace

template <class T>
const RowKernels<T>& row_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::kernels(T{});
  if (isa() == Isa::avx2) return avx2::kernels(T{});
#endif
  return baseline::kernels(T{});
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<bf16>& row_kernels<bf16>();
template const RowKernels<f16>& row_kernels<f16>();

const char* row_kernel_isa() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace resnet_fused::cpu
