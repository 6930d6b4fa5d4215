// The element types of the kernels as bit patterns, without CUDA's headers: they compile for a CPU, too.
#pragma once

#include <stdint.h>

namespace resnet_fused::cuda {

struct alignas(2) bf16 {
  uint16_t bits;
};
struct alignas(2) f16 {
  uint16_t bits;
};

// uint4 by another name: CUDA's own is not there on a CPU.
struct alignas(16) Bits128 {
  uint32_t word[4];
};

// What vectors (norm parameters, scales, biases) may be made of.
enum class Scalar : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

}  // namespace resnet_fused::cuda
