// Convolutions of a block. They go to oneDNN through ATen. A convolution of our own, with the normalisation in its
// prologue and the statistics in its epilogue, would replace this file.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../block/spec.h"

namespace resnet_fused::cpu {

// Every function pads p itself, as the stage's padding mode says.

// y = conv(p, weight) + bias in channels_last.
at::Tensor convolution(
    const at::Tensor& p, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const Stage& stage);

// The gradient of p; `like_p` gives its shape and is not read.
at::Tensor convolution_backward_data(
    const at::Tensor& dy, const at::Tensor& like_p, const at::Tensor& weight, const Stage& stage);

// Whether the gradient of p can be added to a tensor without an intermediate: the convolution is a matrix product.
bool accumulates_backward_data(const at::Tensor& weight, const Stage& stage);
// accumulated += the gradient of p, in that case.
void accumulate_backward_data(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& accumulated);

struct WeightGradients {
  at::Tensor weight, bias;  // undefined where not asked for
};
WeightGradients convolution_backward_weight(
    const at::Tensor& dy, const at::Tensor& p, const at::Tensor& weight, const Stage& stage, bool needs_weight,
    bool needs_bias);

// Up to this number of pixels a matrix product beats oneDNN's convolution. Creating that primitive takes 10 to 50
// microseconds each time, and without AMX it is slow in bfloat16 (2 x 7 x 7 pixels, 2048 to 512 channels: 2.4 ms
// against 1.0; its weight gradient 4.5 against 1.0; measured with torch 2.13 on Zen 4).
constexpr int64_t kFewPixels = 128;

// Whether the functions above convolve this dtype of 16 bits as float32, in which its products are exact, and round the
// results: where oneDNN does not multiply it, PyTorch has plain loops. ResNet-50's training step, batch 4, 128 x 128,
// by AVX2 (Zen 3, 2 threads, torch 2.13): 7.0 s in bfloat16 and 8.6 s in float16 with those, 0.44 s and 0.77 s this
// way.
bool widens(at::ScalarType dtype);

// Whether oneDNN runs x's dtype here, so that the fused forms below can be used.
bool has_post_ops(at::ScalarType dtype);
bool has_post_ops(const at::Tensor& x);

// Whether oneDNN applies this activation to a convolution's sums. Of a NaN its results differ from PyTorch's.
bool is_post_op(const Activation& act);

// act(conv + bias) as one oneDNN primitive; act is a post-op.
at::Tensor convolution_act(
    const at::Tensor& p, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const Stage& stage,
    const Activation& act);

// relu(conv + bias + other), or without the relu; `other` is overwritten with the result where `in_place`.
at::Tensor convolution_add_act(
    const at::Tensor& p, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const Stage& stage,
    const at::Tensor& other, bool in_place, bool relu);

}  // namespace resnet_fused::cpu
