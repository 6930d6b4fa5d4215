// Which instruction set's depthwise kernels run (isa.h).
#include "depthwise_kernels.h"

#include "../isa.h"

namespace resnet_fused::cpu {

#define DECLARE_TABLES(isa)                        \
  namespace isa {                                  \
  const DepthwiseKernels<float>& depthwise(float); \
  const DepthwiseKernels<bf16>& depthwise(bf16);   \
  }
DECLARE_TABLES(baseline)
#if defined(RESNET_FUSED_X86)
DECLARE_TABLES(avx2)
DECLARE_TABLES(avx512)
#endif
#undef DECLARE_TABLES

template <class T>
const DepthwiseKernels<T>& depthwise_kernels() {
#if defined(RESNET_FUSED_X86)
  if (vector_isa() >= Isa::avx512) return avx512::depthwise(T{});
  if (vector_isa() >= Isa::avx2) return avx2::depthwise(T{});
#endif
  return baseline::depthwise(T{});
}

template const DepthwiseKernels<float>& depthwise_kernels<float>();
template const DepthwiseKernels<bf16>& depthwise_kernels<bf16>();

}  // namespace resnet_fused::cpu
