// torch.ops.resnet_fused.{batch_statistics, normalize_act, normalize_act_backward_reduce,
// normalize_act_backward_apply}: schemas, checks that keep a bad call from reading out of bounds, the CPU dispatch key.
// resnet_fused/ops/norm_operators.py documents the arguments.
#include "batch_norm_act.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "../cpu/batch_norm_act.h"

namespace resnet_fused {
namespace {

void check_x(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must be a non-empty [N, C, H, W], got ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, "x is ", type,
      "; accepted: Float, Double, BFloat16, Half");
}

void check_device(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), "x is on ", x.device(), ", ", name, " on ", t.device());
}

void check_like_x(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), name, " must be ", x.sizes(), " as x is, got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), "x is ", x.scalar_type(), ", ", name, " is ", t.scalar_type());
  check_device(name, t, x);
}

void check_vector(const char* name, const std::optional<at::Tensor>& t, const at::Tensor& x) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == x.size(1), name, " must be [", x.size(1), "], got ", t->sizes());
  const auto type = t->scalar_type();
  TORCH_CHECK_TYPE(
      type == x.scalar_type() || type == statistics_type(x), name, " is ", type, " for an x of ", x.scalar_type(),
      "; accepted: ", x.scalar_type(), ", ", statistics_type(x));
  check_device(name, *t, x);
}

void check_mask(const std::optional<at::Tensor>& mask, const at::Tensor& x) {
  if (!mask) return;
  const auto sizes = mask_sizes(x);
  TORCH_CHECK_VALUE(
      mask->sizes() == at::IntArrayRef(sizes), "mask must be ", at::IntArrayRef(sizes),
      " as normalize_act returned it for x ", x.sizes(), ", got ", mask->sizes());
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kByte, "mask is ", mask->scalar_type(), "; accepted: Byte");
  check_device("mask", *mask, x);
}

void check_eps(double eps) {
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "eps must be a finite number >= 0, got ", eps);
}

}  // namespace

at::ScalarType statistics_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::vector<int64_t> mask_sizes(const at::Tensor& x) {
  return {x.size(0) * x.size(2) * x.size(3), (x.size(1) + 7) / 8};
}

void check_batch_statistics(const at::Tensor& x) { check_x(x); }

void check_normalize_act(
    const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, double eps, bool relu,
    bool save_mask) {
  check_x(x);
  check_vector("mean", mean, x);
  check_vector("var", var, x);
  check_vector("weight", weight, x);
  check_vector("bias", bias, x);
  if (residual) check_like_x("residual", *residual, x);
  check_eps(eps);
  TORCH_CHECK_VALUE(relu || !save_mask, "save_mask=True needs relu=True: without an activation there is no mask");
}

void check_normalize_act_backward_reduce(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean) {
  check_x(x);
  check_like_x("dout", dout, x);
  check_mask(mask, x);
  check_vector("mean", mean, x);
}

void check_normalize_act_backward_apply(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean,
    const at::Tensor& var, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& sums, double count,
    double eps) {
  check_normalize_act_backward_reduce(dout, mask, x, mean);
  check_vector("var", var, x);
  check_vector("weight", weight, x);
  check_eps(eps);
  if (!sums) return;
  TORCH_CHECK_VALUE(
      sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == x.size(1), "sums must be [2, ", x.size(1), "], got ",
      sums->sizes());
  TORCH_CHECK_TYPE(sums->scalar_type() == at::kDouble, "sums is ", sums->scalar_type(), "; accepted: Double");
  check_device("sums", *sums, x);
  TORCH_CHECK_VALUE(count >= 1, "sums need the count of values per channel behind them, got count=", count);
}

namespace {

struct CpuKernels {
  static constexpr auto batch_statistics = &cpu::batch_statistics;
  static constexpr auto normalize_act = &cpu::normalize_act;
  static constexpr auto normalize_act_backward_reduce = &cpu::normalize_act_backward_reduce;
  static constexpr auto normalize_act_backward_apply = &cpu::normalize_act_backward_apply;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(resnet_fused, m) { define_batch_norm_act(m, ""); }

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { implement_batch_norm_act<CpuKernels>(m, ""); }

}  // namespace resnet_fused
