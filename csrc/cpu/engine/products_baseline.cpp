// The products compiled for whatever processor there is.
#include "products.h"

#define KERNELS_ISA baseline
#define VECTOR_BYTES 16
#include "vector_products_impl.h"

namespace resnet_fused::cpu::baseline {
const engine::Products<float>& products(float) {
  static constexpr engine::Products<float> table{kVectorRows, false, &multiply<float>};
  return table;
}
const engine::Products<bf16>& products(bf16) {
  static constexpr engine::Products<bf16> table{kVectorRows, false, &multiply<bf16>};
  return table;
}
}  // namespace resnet_fused::cpu::baseline
