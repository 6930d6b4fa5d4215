// The products of bfloat16 compiled for AMX.
#include "products.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#define KERNELS_ISA amx
#define VECTOR_BYTES 64
#define HAS_BF16
#include "epilogue_impl.h"
#include "tiles_amx.h"

#include "tile_products_impl.h"
#endif
