// A gate of known layers in evaluation, in one call: the mean of each channel of each image, the layers that make a
// factor of it, and the join, act(factor * y + skip).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "gated_join.h"

namespace resnet_fused::cpu {

// One layer of a gate on [N, C]: linear where weight is [out, in, 1, 1] or [out, in]; over neighbouring channels, with
// zeros around them, where it is [1, 1, k]; then an activation. Tensors of float32 are rounded to y's type.
struct GateLayer {
  at::Tensor weight;
  std::optional<at::Tensor> bias;
  std::string_view act;
};

// Whether `gate_` has an activation of this name.
bool is_gate_activation(std::string_view name);

// Writes act(factor * y + skip) over y, which is channels_last and dense; skip may have any strides.
void gate_(
    const at::Tensor& y, const std::optional<at::Tensor>& skip, const std::vector<GateLayer>& layers,
    const JoinActivation& act);

}  // namespace resnet_fused::cpu
