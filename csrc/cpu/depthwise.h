// Gradients of convolutions with a filter of its own for each channel, in channels_last, where oneDNN's are slow.
#pragma once

#include <ATen/core/Tensor.h>

#include "../block/spec.h"

namespace resnet_fused::cpu {

// Whether the functions below compute the gradients faster than oneDNN: of convolutions with one filter for each
// channel and zeros as padding, in float or bfloat16.
//
// Measured with torch 2.13 on Zen 5, 2 threads, batch 4: the weight gradient of 240 channels, 28 x 28 pixels, 5 x 5,
// takes oneDNN 1.8 ms in float and 4.7 ms in bfloat16, us 0.24 ms; of 1152 channels, 7 x 7, 1.2, 4.2 and 0.21 ms. Of
// 3 x 3 it takes oneDNN 0.17 to 0.5 ms, us up to twice as long. The input's gradient of a stride of 2 in bfloat16
// (96 channels, 112 x 112) takes oneDNN 10.2 ms, us 0.5 ms. Other gradients gain nothing.
bool has_faster_backward_data(const at::Tensor& weight, const Stage& stage);
bool has_faster_backward_weight(const at::Tensor& weight, const Stage& stage);

// Each returns channels_last, or an undefined tensor where a value is not finite and the zeros of the padding must not
// be multiplied with it: ATen then computes. The sums of an output are float's, added in the same order for every
// number of threads.

// `like_p` gives the shape of p's gradient and is not read.
at::Tensor depthwise_backward_data(
    const at::Tensor& dy, const at::Tensor& like_p, const at::Tensor& weight, const Stage& stage);

// The weight's gradient in its own memory format.
at::Tensor depthwise_backward_weight(
    const at::Tensor& dy, const at::Tensor& p, const at::Tensor& weight, const Stage& stage);

}  // namespace resnet_fused::cpu
