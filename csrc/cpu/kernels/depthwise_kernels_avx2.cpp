// The depthwise kernels compiled for avx2.
#include "depthwise_kernels.h"

#include "../../block/activations.h"

#if defined(RESNET_FUSED_X86)
#pragma GCC target("avx2,fma,f16c")
#define KERNELS_ISA avx2
#define VECTOR_BYTES 32
#include "depthwise_kernels_impl.h"
#endif
