// The end of a block with a gate on the CPU: act((y - center) * scale + shift + skip), with a scale and a shift for
// each image and channel, and the two passes of its backward.
//
// The arguments are those of the operators in ../ops/gated_join.cpp, checked. Tensors of y's size may have any strides;
// results are channels_last.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "../block/activations.h"

namespace resnet_fused::cpu {

struct JoinActivation {
  Activation act;
  std::optional<at::Tensor> slope;  // [1] or [C], of prelu
};

// [N, 2, C]: mean and biased variance of each image.
at::Tensor image_statistics(const at::Tensor& x);

// affine: [N, 3, C], center, scale and shift.
at::Tensor gated_join(
    const at::Tensor& y, const at::Tensor& affine, const std::optional<at::Tensor>& skip, const JoinActivation& act);

// (sums, dz). sums: [N, 2, C], double: of dz and of dz * (y - center); for prelu [N, 3, C] with dout * z where z <= 0,
// the slope's. dz = dout * act'; [0], standing for dout, where act is the identity.
std::tuple<at::Tensor, at::Tensor> gated_join_backward_reduce(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const at::Tensor& y, const at::Tensor& affine,
    const std::optional<at::Tensor>& skip, const JoinActivation& act);

// dy = k_dz * dz + k_y * (y - center) + k; coefficients: [N, 4, C], center, k_dz, k_y, k. Without y the last two do not
// count.
at::Tensor gated_join_backward_apply(
    const at::Tensor& dz, const std::optional<at::Tensor>& y, const at::Tensor& coefficients);

}  // namespace resnet_fused::cpu
