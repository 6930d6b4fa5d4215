// What the operators that end a block check of their arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../cpu/gated_join.h"

namespace resnet_fused {

inline void check_x(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, name, " must be a non-empty [N, C, H, W], got ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name, " is ", type,
      "; accepted: Float, Double, BFloat16, Half");
}

inline void check_like(const char* name, const std::optional<at::Tensor>& t, const at::Tensor& x) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->sizes() == x.sizes(), name, " must be ", x.sizes(), " as y is, got ", t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type(), "y is ", x.scalar_type(), ", ", name, " is ", t->scalar_type());
}

inline cpu::JoinActivation join_activation(
    int64_t kind, double parameter, const std::optional<at::Tensor>& slope, const at::Tensor& y) {
  TORCH_CHECK_VALUE(kind >= 0 && kind < kActivations, "unknown activation code ", kind);
  const Activation act{static_cast<ActivationKind>(kind), parameter};
  TORCH_CHECK_VALUE(
      slope.has_value() == act.is(ActivationKind::prelu), "prelu has a slope, and no other activation does");
  TORCH_CHECK_VALUE(
      !slope || (slope->dim() == 1 && (slope->numel() == 1 || slope->numel() == y.size(1))), "slope must be [1] or [",
      y.size(1), "], got ", slope ? slope->sizes() : at::IntArrayRef{});
  return {act, slope};
}

}  // namespace resnet_fused
