// torch.ops.resnet_fused.{image_statistics, gated_join, gated_join_backward_reduce, gated_join_backward_apply}:
// schemas, checks that keep a bad call from reading out of bounds, the CPU dispatch key. resnet_fused/ops/gated_join.py
// documents the arguments.
#include "../cpu/gated_join.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "join_checks.h"

namespace resnet_fused {
namespace {

using Optional = std::optional<at::Tensor>;

at::ScalarType arithmetic_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_rows(const char* name, const at::Tensor& t, int64_t rows, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == rows && t.size(2) == x.size(1), name, " must be [",
      x.size(0), ", ", rows, ", ", x.size(1), "], got ", t.sizes());
  TORCH_CHECK_TYPE(
      t.scalar_type() == arithmetic_type(x), name, " is ", t.scalar_type(), " for a y of ", x.scalar_type(),
      "; accepted: ", arithmetic_type(x));
}

at::Tensor image_statistics(const at::Tensor& x) {
  check_x("x", x);
  return cpu::image_statistics(x);
}

at::Tensor gated_join(
    const at::Tensor& y, const at::Tensor& affine, const Optional& skip, int64_t kind, double parameter,
    const Optional& slope) {
  check_x("y", y);
  check_rows("affine", affine, 3, y);
  check_like("skip", skip, y);
  return cpu::gated_join(y, affine, skip, join_activation(kind, parameter, slope, y));
}

std::tuple<at::Tensor, at::Tensor> gated_join_backward_reduce(
    const at::Tensor& dout, const Optional& out, const at::Tensor& y, const at::Tensor& affine, const Optional& skip,
    int64_t kind, double parameter, const Optional& slope) {
  check_x("y", y);
  check_like("dout", dout, y);
  check_like("out", out, y);
  check_rows("affine", affine, 3, y);
  check_like("skip", skip, y);
  return cpu::gated_join_backward_reduce(dout, out, y, affine, skip, join_activation(kind, parameter, slope, y));
}

at::Tensor gated_join_backward_apply(const at::Tensor& dz, const Optional& y, const at::Tensor& coefficients) {
  check_x("dz", dz);
  check_like("y", y, dz);
  check_rows("coefficients", coefficients, 4, dz);
  return cpu::gated_join_backward_apply(dz, y, coefficients);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("image_statistics(Tensor x) -> Tensor");
  m.def("gated_join(Tensor y, Tensor affine, Tensor? skip, int act, float parameter, Tensor? slope) -> Tensor");
  m.def(
      "gated_join_backward_reduce(Tensor dout, Tensor? out, Tensor y, Tensor affine, Tensor? skip, int act, "
      "float parameter, Tensor? slope) -> (Tensor sums, Tensor dz)");
  m.def("gated_join_backward_apply(Tensor dz, Tensor? y, Tensor coefficients) -> Tensor");
}

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("image_statistics", &image_statistics);
  m.impl("gated_join", &gated_join);
  m.impl("gated_join_backward_reduce", &gated_join_backward_reduce);
  m.impl("gated_join_backward_apply", &gated_join_backward_apply);
}

}  // namespace resnet_fused
