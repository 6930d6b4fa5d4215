// Which instruction set's row kernels run (isa.h).
#include "row_kernels.h"

#include <type_traits>

#include "../isa.h"

namespace resnet_fused::cpu {

#define DECLARE_TABLES(isa)                  \
  namespace isa {                            \
  const RowKernels<float>& kernels(float);   \
  const RowKernels<double>& kernels(double); \
  const RowKernels<bf16>& kernels(bf16);     \
  const RowKernels<f16>& kernels(f16);       \
  }
DECLARE_TABLES(baseline)
#if defined(RESNET_FUSED_X86)
DECLARE_TABLES(avx2)
DECLARE_TABLES(avx512)
namespace avx512_bf16 {
const RowKernels<bf16>& kernels(bf16);
}
#endif
#undef DECLARE_TABLES

template <class T>
const RowKernels<T>& row_kernels() {
#if defined(RESNET_FUSED_X86)
  if constexpr (std::is_same_v<T, bf16>)
    if (vector_isa() >= Isa::avx512_bf16) return avx512_bf16::kernels(T{});
  if (vector_isa() >= Isa::avx512) return avx512::kernels(T{});
  if (vector_isa() >= Isa::avx2) return avx2::kernels(T{});
#endif
  return baseline::kernels(T{});
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<bf16>& row_kernels<bf16>();
template const RowKernels<f16>& row_kernels<f16>();

}  // namespace resnet_fused::cpu
