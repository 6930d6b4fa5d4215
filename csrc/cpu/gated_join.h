// The end of a block with a gate on the CPU: act(gate * norm(y) + skip), with a gate for each image and channel, and
// its backward in two passes, between which the gate's own layers go backward.
//
// The arguments are those of the operators in ../ops/gated_join.cpp, checked. Tensors of y's size may have any strides;
// results are channels_last. What is [C] or [N, C] is computed in double and rounded once.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "../block/activations.h"

namespace resnet_fused::cpu {

struct JoinActivation {
  Activation act;
  std::optional<at::Tensor> slope;  // [1] or [C], of prelu
};

// norm(y) = (y - mean) / sqrt(var + eps) * weight + bias, all [C]; without mean and var, y itself.
struct JoinNorm {
  std::optional<at::Tensor> mean, var, weight, bias;
  double eps;
};

// (statistics, means, pooled). Of the batch, [2, C]: mean and biased variance, then those of `norm`. Of each image,
// [N, C]: the mean of y and, in y's type, of norm(y). Not asked for: [0].
std::tuple<at::Tensor, at::Tensor, at::Tensor> pooled_statistics(
    const at::Tensor& y, const JoinNorm& norm, bool of_batch, bool pools);

at::Tensor gated_join(
    const at::Tensor& y, const at::Tensor& gate, const JoinNorm& norm, const std::optional<at::Tensor>& skip,
    const JoinActivation& act);

// (dz, d_gate, d_slope, handoff). dz = dout * act'; [0], standing for dout, where act is the identity. handoff,
// [3, N, C] in double: the gate, and for each image the sums of dz and of dz * (y - mean).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_join_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const at::Tensor& y, const at::Tensor& gate,
    const JoinNorm& norm, const std::optional<at::Tensor>& skip, const JoinActivation& act);

// Gradients of (y, norm.weight, norm.bias) from that of the mean of norm(y), and from what the join hands on; absent:
// zeros. of_batch: whether mean and var are y's. means: of each image. needs: which are asked for; others are [0].
std::tuple<at::Tensor, at::Tensor, at::Tensor> pooled_norm_backward(
    const std::optional<at::Tensor>& dz, const at::Tensor& y, const std::optional<at::Tensor>& d_pooled,
    const std::optional<at::Tensor>& handoff, const std::optional<at::Tensor>& means, const JoinNorm& norm,
    bool of_batch, std::array<bool, 3> needs);

}  // namespace resnet_fused::cpu
