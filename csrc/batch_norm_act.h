// What every device's kernels of act(batch_norm(x) + residual) share: what they are given, held against each other.
//
// Each check throws ValueError (shapes, counts, devices) or TypeError (dtypes); what passes can be read within bounds:
// x, residual and dout are [N, C, H, W] of one dtype with any strides; mean, var, weight and bias are [C] of x's dtype
// or of `statistics_type`, and need not be contiguous; a mask is contiguous; all are on x's device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace resnet_fused {

// What batch statistics are kept in: float64 for float64, else float32.
at::ScalarType statistics_type(const at::Tensor& x);

// [N * H * W, ceil(C / 8)]: a row of bytes a pixel. Bit c % 8 of byte c / 8 is set where the activation passes channel
// c's gradient, which is where its output is not <= 0: NaN passes. Bits beyond C are 0.
std::vector<int64_t> mask_sizes(const at::Tensor& x);

void check_batch_statistics(const at::Tensor& x);

void check_normalize_act(
    const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, double eps, bool relu,
    bool save_mask);

void check_normalize_act_backward_reduce(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean);

void check_normalize_act_backward_apply(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean,
    const at::Tensor& var, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& sums, double count,
    double eps);

}  // namespace resnet_fused
