// The weight gradient of a 3×3 convolution of float32 by Winograd (winograd.h).
#pragma once

#include <ATen/core/Tensor.h>

namespace resnet_fused::cpu::engine {

// dy, p: channels_last, gradients of the outputs and the inputs; stride and padding are 1, channels multiples of 32.
// Undefined where the result is not finite, since padding is multiplied with gradients, and for small pictures.
at::Tensor winograd_weight_gradient(const at::Tensor& dy, const at::Tensor& p, const at::Tensor& weight);

}  // namespace resnet_fused::cpu::engine
