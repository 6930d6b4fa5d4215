// act(batch_norm(x) + residual) on the CPU: statistics, forward, and the two passes of backward.
//
// The arguments are those of the operators in ../batch_norm_act.cpp, checked. Results the size of x are in x's memory
// format; masks are laid out as ../batch_norm_act.h says.
#pragma once

#include "../ops/batch_norm_act.h"

namespace resnet_fused::cpu {

// [2, C]: mean and biased variance.
at::Tensor batch_statistics(const at::Tensor& x);

// (out, mask); the mask is [0] where it is not saved.
std::tuple<at::Tensor, at::Tensor> normalize_act(
    const at::Tensor& x, const BatchNorm& norm, const std::optional<at::Tensor>& residual, bool relu, bool save_mask);

// [2, C], double: the sums of dz and of dz * (x - mean), where dz is dout where the mask is set.
at::Tensor normalize_act_backward_reduce(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean);

// (dx, dz); dz is [0] where it is not saved. Without sums the statistics are constants, and x is not read.
std::tuple<at::Tensor, at::Tensor> normalize_act_backward_apply(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const BatchNorm& norm,
    const std::optional<at::Tensor>& sums, double count, bool save_dz);

}  // namespace resnet_fused::cpu
