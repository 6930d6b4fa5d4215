// The kernel's entry points: one per element type, each compiled in a file of its own.
#pragma once

#include "launch.h"

namespace resnet_fused::cuda {

struct Kernel {
  const char* name;
  const void* entry;  // the __global__ function
  int (*shared_bytes)(Phase&);
};
Kernel kernel_f32();
Kernel kernel_bf16();
Kernel kernel_f16();

}  // namespace resnet_fused::cuda
