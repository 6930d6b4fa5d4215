// The depthwise kernels compiled for avx512.
#include "depthwise_kernels.h"

#include "../../block/activations.h"

#if defined(RESNET_FUSED_X86)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define KERNELS_ISA avx512
#define VECTOR_BYTES 64
#include "depthwise_kernels_impl.h"
#endif
