// The products compiled for AVX2.
#include "products.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define KERNELS_ISA avx2
#define VECTOR_BYTES 32
#include "vector_products_impl.h"

namespace resnet_fused::cpu::avx2 {
const engine::Products<float>& products(float) { return kVectorProducts<float>; }
const engine::Products<float, bf16>& products(float, bf16) { return kVectorProducts<float, bf16>; }
const engine::Products<float, f16>& products(float, f16) { return kVectorProducts<float, f16>; }
const engine::Products<bf16>& products(bf16) { return kVectorProducts<bf16>; }
}  // namespace resnet_fused::cpu::avx2
#endif
