// run_phases for bfloat16 activations.
#include "../kernels/run_phases.cuh"
#include "kernel.h"

namespace resnet_fused::cuda {

__global__ void __launch_bounds__(kThreads, 2) run_phases_bf16(const __grid_constant__ Program program) {
  run_phases<bf16>(program);
}

Kernel kernel_bf16() {
  return {"run_phases_bf16", reinterpret_cast<const void*>(&run_phases_bf16), &shared_bytes<bf16>};
}

}  // namespace resnet_fused::cuda
