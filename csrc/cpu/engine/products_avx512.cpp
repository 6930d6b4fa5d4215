// The products compiled for AVX-512 without bfloat16.
#include "products.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#define KERNELS_ISA avx512
#define VECTOR_BYTES 64
#include "vector_products_impl.h"

namespace resnet_fused::cpu::avx512 {
const engine::Products<float>& products(float) { return kVectorProducts<float>; }
const engine::Products<float, f16>& products(float, f16) { return kVectorProducts<float, f16>; }
const engine::Products<bf16>& products(bf16) { return kVectorProducts<bf16>; }
}  // namespace resnet_fused::cpu::avx512
#endif
