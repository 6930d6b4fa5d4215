// The products compiled for whatever processor there is.
#include "products.h"

#define KERNELS_ISA baseline
#define VECTOR_BYTES 16
#include "vector_products_impl.h"

namespace resnet_fused::cpu::baseline {
const engine::Products<float>& products(float) { return kVectorProducts<float>; }
const engine::Products<float, bf16>& products(float, bf16) { return kVectorProducts<float, bf16>; }
const engine::Products<float, f16>& products(float, f16) { return kVectorProducts<float, f16>; }
const engine::Products<bf16>& products(bf16) { return kVectorProducts<bf16>; }
}  // namespace resnet_fused::cpu::baseline
