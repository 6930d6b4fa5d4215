#include "gate.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <array>
#include <utility>

#include "../block/kernel_layout.h"
#include "passes.h"

namespace resnet_fused::cpu {
namespace {

using InPlace = at::Tensor& (*)(at::Tensor&);

const std::array<std::pair<std::string_view, InPlace>, 6> kActivations{{
    {"identity", [](at::Tensor& z) -> at::Tensor& { return z; }},
    {"relu", [](at::Tensor& z) -> at::Tensor& { return z.relu_(); }},
    {"silu", [](at::Tensor& z) -> at::Tensor& { return at::silu_(z); }},
    {"hardswish", [](at::Tensor& z) -> at::Tensor& { return at::hardswish_(z); }},
    {"sigmoid", [](at::Tensor& z) -> at::Tensor& { return z.sigmoid_(); }},
    {"hardsigmoid", [](at::Tensor& z) -> at::Tensor& { return at::hardsigmoid_(z); }},
}};

const std::pair<std::string_view, InPlace>* found(std::string_view name) {
  const auto* at =
      std::find_if(kActivations.begin(), kActivations.end(), [&](const auto& each) { return each.first == name; });
  return at == kActivations.end() ? nullptr : at;
}

at::Tensor of_layer(const at::Tensor& p, const GateLayer& layer) {
  const at::Tensor w = layer.weight.to(p.scalar_type());
  std::optional<at::Tensor> bias;
  if (layer.bias) bias = layer.bias->to(p.scalar_type());
  at::Tensor z = w.dim() == 3 ? at::conv1d(p.unsqueeze(1), w, bias, 1, (w.size(2) - 1) / 2).squeeze(1)
                              : at::linear(p, w.reshape({w.size(0), w.size(1)}), bias);
  return found(layer.act)->second(z);
}

}  // namespace

bool is_gate_activation(std::string_view name) { return found(name) != nullptr; }

void gate_(
    const at::Tensor& y, const std::optional<at::Tensor>& skip, const std::vector<GateLayer>& layers,
    const JoinActivation& act) {
  const int64_t channels = y.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, y.scalar_type(), "gate_", [&] {
    using A = acc_t<scalar_t>;
    at::Tensor factor = image_means<scalar_t>(y);
    for (const auto& layer : layers) factor = of_layer(factor, layer);
    NormVectors<A> norm(factor.numel());
    norm.scale = to_vector<A>(factor);
    ResidualInput<A> residual;
    if (skip) residual = {skip->contiguous(kLayout), nullptr, std::vector<A>(channels, A(1))};
    normalize_in_place<scalar_t>(y, norm, act_vectors<A>(act.act, act.slope, channels), residual);
  });
}

}  // namespace resnet_fused::cpu
