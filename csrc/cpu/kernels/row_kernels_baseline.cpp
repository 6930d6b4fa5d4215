// The row kernels compiled for baseline.
#include "row_kernels.h"

#define KERNELS_ISA baseline
#include "row_kernels_impl.h"
