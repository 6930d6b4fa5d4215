// The row kernels compiled for avx2.
#include "row_kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define KERNELS_ISA avx2
#include "row_kernels_impl.h"
#endif
