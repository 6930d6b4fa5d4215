// Max pooling that remembers each maximum's place in its window in one byte.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace resnet_fused::cpu {

struct PoolWindow {
  int64_t kernel, stride, padding;  // square
};

// (maxima in x's memory format, positions in channels_last)
std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& x, const PoolWindow& window);

// The gradient of an input of height x width, in dout's memory format.
at::Tensor max_pool2d_backward(
    const at::Tensor& dout, const at::Tensor& positions, int64_t height, int64_t width, const PoolWindow& window);

}  // namespace resnet_fused::cpu
