// torch.ops.resnet_fused.{pooled_statistics, gated_join, gated_join_backward, pooled_norm_backward}: schemas, checks
// that keep a bad call from reading out of bounds, the CPU dispatch key. resnet_fused/ops/join_operators.py documents
// the arguments.
#include "../cpu/gated_join.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "join_checks.h"

namespace resnet_fused {
namespace {

using Optional = std::optional<at::Tensor>;

void check_sizes(const char* name, const Optional& t, at::IntArrayRef sizes) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->sizes() == sizes, name, " must be ", sizes, ", got ", t->sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(t->scalar_type()), name, " is ", t->scalar_type(), "; accepted: floating point");
}

cpu::JoinNorm join_norm(
    const at::Tensor& y, const Optional& mean, const Optional& var, const Optional& weight, const Optional& bias,
    double eps) {
  check_sizes("mean", mean, {y.size(1)});
  check_sizes("var", var, {y.size(1)});
  check_sizes("weight", weight, {y.size(1)});
  check_sizes("bias", bias, {y.size(1)});
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "mean and var go together: both, or None for both");
  return {mean, var, weight, bias, eps};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pooled_statistics(
    const at::Tensor& y, const Optional& mean, const Optional& var, const Optional& weight, const Optional& bias,
    double eps, bool of_batch, bool pools) {
  check_x("y", y);
  return cpu::pooled_statistics(y, join_norm(y, mean, var, weight, bias, eps), of_batch, pools);
}

at::Tensor gated_join(
    const at::Tensor& y, const at::Tensor& gate, const Optional& mean, const Optional& var, const Optional& weight,
    const Optional& bias, double eps, const Optional& skip, int64_t kind, double parameter, const Optional& slope) {
  check_x("y", y);
  check_sizes("gate", gate, {y.size(0), y.size(1)});
  check_like("skip", skip, y);
  const auto norm = join_norm(y, mean, var, weight, bias, eps);
  return cpu::gated_join(y, gate, norm, skip, join_activation(kind, parameter, slope, y));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_join_backward(
    const at::Tensor& dout, const Optional& out, const at::Tensor& y, const at::Tensor& gate, const Optional& mean,
    const Optional& var, const Optional& weight, const Optional& bias, double eps, const Optional& skip, int64_t kind,
    double parameter, const Optional& slope) {
  check_x("y", y);
  check_like("dout", dout, y);
  check_like("out", out, y);
  check_sizes("gate", gate, {y.size(0), y.size(1)});
  check_like("skip", skip, y);
  const auto norm = join_norm(y, mean, var, weight, bias, eps);
  return cpu::gated_join_backward(dout, out, y, gate, norm, skip, join_activation(kind, parameter, slope, y));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pooled_norm_backward(
    const Optional& dz, const at::Tensor& y, const Optional& d_pooled, const Optional& handoff, const Optional& means,
    const Optional& mean, const Optional& var, const Optional& weight, const Optional& bias, double eps, bool of_batch,
    std::array<bool, 3> needs) {
  check_x("y", y);
  check_like("dz", dz, y);
  check_sizes("d_pooled", d_pooled, {y.size(0), y.size(1)});
  check_sizes("handoff", handoff, {3, y.size(0), y.size(1)});
  check_sizes("means", means, {y.size(0), y.size(1)});
  const auto norm = join_norm(y, mean, var, weight, bias, eps);
  TORCH_CHECK_VALUE(!needs[1] || weight, "a gradient is needed of the weight, which is None");
  TORCH_CHECK_VALUE(!needs[2] || bias, "a gradient is needed of the bias, which is None");
  return cpu::pooled_norm_backward(dz, y, d_pooled, handoff, means, norm, of_batch, needs);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  const std::string norm = "Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps";
  const std::string act = "int act, float parameter, Tensor? slope";
  m.def(("pooled_statistics(Tensor y, " + norm +
         ", bool of_batch, bool pools) -> (Tensor statistics, Tensor means, Tensor pooled)")
            .c_str());
  m.def(("gated_join(Tensor y, Tensor gate, " + norm + ", Tensor? skip, " + act + ") -> Tensor").c_str());
  m.def(("gated_join_backward(Tensor dout, Tensor? out, Tensor y, Tensor gate, " + norm + ", Tensor? skip, " + act +
         ") -> (Tensor dz, Tensor d_gate, Tensor d_slope, Tensor handoff)")
            .c_str());
  m.def(("pooled_norm_backward(Tensor? dz, Tensor y, Tensor? d_pooled, Tensor? handoff, Tensor? means, " + norm +
         ", bool of_batch, bool[3] needs) -> (Tensor dy, Tensor d_weight, Tensor d_bias)")
            .c_str());
}

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("pooled_statistics", &pooled_statistics);
  m.impl("gated_join", &gated_join);
  m.impl("gated_join_backward", &gated_join_backward);
  m.impl("pooled_norm_backward", &pooled_norm_backward);
}

}  // namespace resnet_fused
