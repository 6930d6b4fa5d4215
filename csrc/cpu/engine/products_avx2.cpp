// The products compiled for AVX2.
#include "products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define KERNELS_ISA avx2
#define VECTOR_BYTES 32
#include "vector_products_impl.h"

namespace resnet_fused::cpu::avx2 {
const engine::Products<float>& products(float) {
  static constexpr engine::Products<float> table{kVectorRows, false, &multiply<float>};
  return table;
}
const engine::Products<bf16>& products(bf16) {
  static constexpr engine::Products<bf16> table{kVectorRows, false, &multiply<bf16>};
  return table;
}
}  // namespace resnet_fused::cpu::avx2
#endif
