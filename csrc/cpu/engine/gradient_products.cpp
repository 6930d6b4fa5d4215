// Which instruction set's products of a weight gradient run (isa.h).
#include "gradient_products.h"

#include "../isa.h"

namespace resnet_fused::cpu {

namespace amx_portable {
const engine::GradientKernels& gradient_kernels();
}
#if defined(RESNET_FUSED_X86)
namespace amx {
const engine::GradientKernels& gradient_kernels();
}
#endif

namespace engine {

const GradientKernels& gradient_kernels() {
#if defined(RESNET_FUSED_X86)
  if (isa() == Isa::amx) return amx::gradient_kernels();
#endif
  return amx_portable::gradient_kernels();
}

}  // namespace engine
}  // namespace resnet_fused::cpu
