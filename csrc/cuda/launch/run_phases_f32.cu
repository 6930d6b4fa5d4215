// run_phases for float32 activations.
#include "../kernels/run_phases.cuh"
#include "kernel.h"

namespace resnet_fused::cuda {

__global__ void __launch_bounds__(kThreads, 2) run_phases_f32(const __grid_constant__ Program program) {
  run_phases<float>(program);
}

Kernel kernel_f32() { return {"run_phases_f32", reinterpret_cast<const void*>(&run_phases_f32), &shared_bytes<float>}; }

}  // namespace resnet_fused::cuda
