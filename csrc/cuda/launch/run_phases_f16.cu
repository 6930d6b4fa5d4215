// run_phases for float16 activations.
#include "../kernels/run_phases.cuh"
#include "kernel.h"

namespace resnet_fused::cuda {

__global__ void __launch_bounds__(kThreads, 2) run_phases_f16(const __grid_constant__ Program program) {
  run_phases<f16>(program);
}

Kernel kernel_f16() { return {"run_phases_f16", reinterpret_cast<const void*>(&run_phases_f16), &shared_bytes<f16>}; }

}  // namespace resnet_fused::cuda
