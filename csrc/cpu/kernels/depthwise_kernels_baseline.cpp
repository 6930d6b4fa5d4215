// The depthwise kernels compiled for baseline.
#include "depthwise_kernels.h"

#include "../../block/activations.h"

#define KERNELS_ISA baseline
#define VECTOR_BYTES 16
#include "depthwise_kernels_impl.h"
