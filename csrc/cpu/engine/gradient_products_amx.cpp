// The weight gradient's products compiled for AMX.
#include "gradient_products.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#define KERNELS_ISA amx
#define VECTOR_BYTES 64
#include "tiles_amx.h"

#include "gradient_tile_products_impl.h"
#endif
