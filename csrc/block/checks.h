// Checks that keep a bad call of an operator from reading out of bounds; user-facing errors come from validation.py.
// All throw ValueError or TypeError that say what was given and what is accepted.
#pragma once

#include "spec.h"
#include "tensors.h"

namespace resnet_fused {

using Shape = std::vector<int64_t>;  // [N, C, H, W]

// The shape of each convolution's output.
std::vector<Shape> check_convolutions(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, const BlockSpec& spec);

// The same; checks every other argument of forward as well.
std::vector<Shape> check_block(const BlockTensors& block, const BlockSpec& spec);

// Which gradients are wanted: a flag for each tensor of the block, in flat order.
Needs check_needs(const std::vector<bool>& flags, std::optional<at::ScalarType> master, const BlockSpec& spec);

// Checks the other arguments of backward; shapes: the result of `check_block`.
void check_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const BlockSpec& spec,
    const std::vector<Shape>& shapes);

// Checks what is added in place of a skip path; shapes: from check_convolutions.
void check_residual(
    const std::optional<at::Tensor>& residual, const at::Tensor& x, const BlockSpec& spec,
    const std::vector<Shape>& shapes);

// Checks the other arguments of evaluation; channels: of the result.
void check_infer(
    const at::Tensor& x, const std::optional<at::Tensor>& pre_scale, const std::optional<at::Tensor>& pre_shift,
    const std::optional<at::Tensor>& branch_scale, const std::optional<at::Tensor>& skip_scale,
    const OptionalTensors& slopes, const BlockSpec& spec, const std::vector<Shape>& shapes);

}  // namespace resnet_fused
