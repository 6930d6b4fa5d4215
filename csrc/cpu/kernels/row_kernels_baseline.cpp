// The row kernels compiled for baseline.
#include "row_kernels.h"

#define ROW_KERNELS_ISA baseline
#include "row_kernels_impl.h"
