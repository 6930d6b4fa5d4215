// Convolutions with a filter of its own for each channel, in channels_last. oneDNN's weight gradient of larger windows
// and its bfloat16 gradient of strided ones take 10 to 200 times what memory needs (docs/performance.md).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../block/spec.h"

namespace resnet_fused::cpu {

// Whether the functions below compute this convolution: one filter for each channel, zeros as padding, float or
// bfloat16.
bool is_depthwise(const at::Tensor& weight, const Stage& stage);

// Each returns channels_last, or an undefined tensor where a value is not finite and the zeros of the padding must not
// be multiplied with it: ATen then computes. The sums of an output are float's, added in the same order for every
// number of threads.

at::Tensor depthwise(
    const at::Tensor& p, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const Stage& stage);

// `like_p` gives the shape of p's gradient and is not read.
at::Tensor depthwise_backward_data(
    const at::Tensor& dy, const at::Tensor& like_p, const at::Tensor& weight, const Stage& stage);

// The weight's gradient in its own memory format.
at::Tensor depthwise_backward_weight(
    const at::Tensor& dy, const at::Tensor& p, const at::Tensor& weight, const Stage& stage);

}  // namespace resnet_fused::cpu
