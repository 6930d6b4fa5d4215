// torch.ops.resnet_fused.gate_: the schema, checks that keep a bad call from reading out of bounds, the CPU dispatch
// key. resnet_fused/ops/join_operators.py documents the arguments.
#include "../cpu/gate.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include "../block/kernel_layout.h"
#include "join_checks.h"

namespace resnet_fused {
namespace {

void gate_(
    const at::Tensor& y, const std::optional<at::Tensor>& skip, at::TensorList weights,
    const c10::List<std::optional<at::Tensor>>& biases, const c10::List<std::string>& acts, int64_t kind,
    double parameter, const std::optional<at::Tensor>& slope) {
  check_x("y", y);
  check_like("skip", skip, y);
  TORCH_CHECK_VALUE(y.is_contiguous(kLayout), "y must be channels_last and dense: it is written over");
  TORCH_CHECK_VALUE(
      !weights.empty() && weights.size() == biases.size() && weights.size() == acts.size(),
      "a gate has a weight, a bias or None and an activation for each of its layers, got ", weights.size(), ", ",
      biases.size(), " and ", acts.size());
  const std::vector<std::string> names = acts.vec();
  std::vector<cpu::GateLayer> layers;
  int64_t width = y.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto& w = weights[i];
    const std::optional<at::Tensor> bias = biases.get(i);
    const bool slides = w.dim() == 3 && w.size(0) == 1 && w.size(1) == 1 && w.size(2) % 2 == 1;
    const bool linear = (w.dim() == 2 || (w.dim() == 4 && w.size(2) * w.size(3) == 1)) && w.size(1) == width;
    TORCH_CHECK_VALUE(
        slides || linear, "layer ", i, " of the gate reads ", width, " values, its weight is ", w.sizes(),
        "; accepted: [out, ", width, "], [out, ", width, ", 1, 1], [1, 1, odd]");
    if (linear) width = w.size(0);
    TORCH_CHECK_VALUE(
        !bias || (bias->dim() == 1 && bias->size(0) == w.size(0)), "the bias of layer ", i, " must be [", w.size(0),
        "], got ", bias ? bias->sizes() : at::IntArrayRef{});
    for (const auto& t : {std::optional<at::Tensor>(w), bias})
      TORCH_CHECK_TYPE(
          !t || ((t->scalar_type() == y.scalar_type() || t->scalar_type() == at::kFloat) && t->device() == y.device()),
          "y is ", y.scalar_type(), ", a tensor of layer ", i, " is ", t ? t->scalar_type() : at::kFloat,
          "; accepted: y's type or Float, on y's device");
    TORCH_CHECK_VALUE(cpu::is_gate_activation(names[i]), "a gate has no activation ", names[i]);
    layers.push_back({w, bias, names[i]});
  }
  TORCH_CHECK_VALUE(width == y.size(1), "the gate gives ", width, " factors for ", y.size(1), " channels");
  const auto act = join_activation(kind, parameter, slope, y);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  cpu::gate_(y, skip, layers, act);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "gate_(Tensor(a!) y, Tensor? skip, Tensor[] weights, Tensor?[] biases, str[] acts, int act, float parameter, "
      "Tensor? slope) -> ()");
}

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("gate_", &gate_); }

}  // namespace resnet_fused
