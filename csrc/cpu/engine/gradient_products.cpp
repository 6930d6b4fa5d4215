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
namespace avx512_bf16 {
const engine::GradientKernels& gradient_kernels();
}
#endif

namespace engine {

const GradientKernels* gradient_kernels() {
  switch (isa()) {
    case Isa::amx_portable:
      return &amx_portable::gradient_kernels();
#if defined(RESNET_FUSED_X86)
    case Isa::amx:
      return &amx::gradient_kernels();
    case Isa::avx512_bf16:
      return &avx512_bf16::gradient_kernels();
#endif
    default:
      return nullptr;
  }
}

}  // namespace engine
}  // namespace resnet_fused::cpu
