// The products by tiles, with the tile operations in plain C++, for machines without AMX. They are slow and otherwise
// the same. Tests run them (RESNET_FUSED_ISA=amx_portable).

#include "products.h"

#define KERNELS_ISA amx_portable
#define VECTOR_BYTES 16
#include "epilogue_impl.h"
#include "tiles_portable.h"

#include "tile_products_impl.h"
