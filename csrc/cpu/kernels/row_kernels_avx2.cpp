// The row kernels compiled for avx2.
#include "row_kernels.h"

#if defined(RESNET_FUSED_X86)
#pragma GCC target("avx2,fma,f16c")
#define KERNELS_ISA avx2
#include "row_kernels_impl.h"
#endif
