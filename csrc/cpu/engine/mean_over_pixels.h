// Global average pooling of the engine's results.
#pragma once

#include <ATen/core/Tensor.h>

namespace resnet_fused::cpu::engine {

// x: [N, C, H, W], float32, bfloat16 or float16, any layout. The mean over all pixels in float32, rounded once: [N, C,
// 1, 1].
at::Tensor mean_over_pixels(const at::Tensor& x);

}  // namespace resnet_fused::cpu::engine
