// The tensors of one residual block and what its operators return, whatever the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace resnet_fused {

using OptionalTensors = std::vector<std::optional<at::Tensor>>;

// The tensors of a block: one entry a convolution, in the order of BlockSpec::convs.
struct BlockTensors {
  at::Tensor x;
  std::optional<at::Tensor> branch_scale, skip_scale;
  std::vector<at::Tensor> weights;
  OptionalTensors biases, norm_weights, norm_biases, running_means, running_vars;
};

// Which gradients are wanted, in the flat order (x, branch_scale, skip_scale, then six a convolution).
class Needs {
 public:
  explicit Needs(std::vector<bool> flags) : flags_(std::move(flags)) {}
  bool x() const { return flags_[0]; }
  bool branch_scale() const { return flags_[1]; }
  bool skip_scale() const { return flags_[2]; }
  bool weight(int64_t conv) const { return flags_[3 + 6 * conv]; }
  bool bias(int64_t conv) const { return flags_[4 + 6 * conv]; }
  bool norm_weight(int64_t conv) const { return flags_[5 + 6 * conv]; }
  bool norm_bias(int64_t conv) const { return flags_[6 + 6 * conv]; }
  bool norm(int64_t conv) const { return norm_weight(conv) || norm_bias(conv); }
  bool any(int64_t conv) const { return weight(conv) || bias(conv) || norm(conv); }
  const std::vector<bool>& flags() const { return flags_; }

 private:
  std::vector<bool> flags_;
};

struct BlockForward {
  at::Tensor out;
  std::vector<at::Tensor> conv_outputs, batch_stats;
};

}  // namespace resnet_fused
