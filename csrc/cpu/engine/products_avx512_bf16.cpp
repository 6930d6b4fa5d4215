// The products of bfloat16 compiled for AVX-512 with its dot products.
#include "products.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#define KERNELS_ISA avx512_bf16
#define VECTOR_BYTES 64
#define HAS_BF16
#include "vector_products_impl.h"

namespace resnet_fused::cpu::avx512_bf16 {
const engine::Products<bf16>& products(bf16) { return kVectorProducts<bf16>; }
}  // namespace resnet_fused::cpu::avx512_bf16
#endif
