// The same products with the tile operations in plain C++ (RESNET_FUSED_ISA=amx_portable).
#include "gradient_products.h"

#define KERNELS_ISA amx_portable
#define VECTOR_BYTES 16
#include "../kernels/elementwise_impl.h"
#include "tiles_portable.h"

#include "gradient_tile_products_impl.h"
