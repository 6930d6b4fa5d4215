// The row kernels of bfloat16 for AVX-512 with its conversions: the heaviest are its own, the others avx512's.
#include "row_kernels.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
namespace resnet_fused::cpu::avx512 {
const RowKernels<bf16>& kernels(bf16);
}
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#define KERNELS_ISA avx512_bf16
#include "bf16_row_kernels_impl.h"

namespace resnet_fused::cpu::avx512_bf16 {

const RowKernels<bf16>& kernels(bf16) {
  static const RowKernels<bf16> table = [] {
    auto kernels = avx512::kernels(bf16{});
    kernels.statistics = statistics;
    kernels.normalize = normalize;
    kernels.backward_reduce = backward_reduce;
    kernels.backward_apply = backward_apply;
    kernels.max_and_place = max_and_place;
    return kernels;
  }();
  return table;
}

}  // namespace resnet_fused::cpu::avx512_bf16
#endif
