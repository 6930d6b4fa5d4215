// The weight gradient's products compiled for AVX-512 with bfloat16's dot products.
#include "gradient_products.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#define KERNELS_ISA avx512_bf16
#define VECTOR_BYTES 64
#define HAS_BF16
#include "gradient_vector_products_impl.h"
#endif
