// The tensors of one residual block and what its operators return, whatever the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace resnet_fused {

using OptionalTensors = std::vector<std::optional<at::Tensor>>;

// The tensors of a block: one entry for each convolution, in the order of BlockSpec::convs.
struct BlockTensors {
  at::Tensor x;
  std::optional<at::Tensor> branch_scale, skip_scale;
  std::vector<at::Tensor> weights;
  OptionalTensors biases, norm_weights, norm_biases, running_means, running_vars, slopes;
};

// One value for each of them: whether its gradient is wanted, or the gradient. The flat order is that of the operators'
// arguments, as in resnet_fused/spec/tensors.py.
template <class T>
struct PerTensor {
  T x{}, branch_scale{}, skip_scale{};
  std::vector<T> weights, biases, norm_weights, norm_biases, running_means, running_vars, slopes;

  explicit PerTensor(size_t convs)
      : weights(convs),
        biases(convs),
        norm_weights(convs),
        norm_biases(convs),
        running_means(convs),
        running_vars(convs),
        slopes(convs) {}

  std::vector<T*> flat() {
    std::vector<T*> all{&x, &branch_scale, &skip_scale};
    for (auto* each : {&weights, &biases, &norm_weights, &norm_biases, &running_means, &running_vars, &slopes})
      for (T& value : *each) all.push_back(&value);
    return all;
  }
};

// Which gradients are wanted.
struct Needs : PerTensor<uint8_t> {
  using PerTensor::PerTensor;
  std::optional<at::ScalarType> master;  // dtype of weights' and biases' gradients; nullopt: their own
  bool norm(int64_t stage) const { return norm_weights[stage] || norm_biases[stage]; }
};

using Gradients = PerTensor<at::Tensor>;

// A block for evaluation. Its norms are folded into weights and biases, except the one before the first convolution in
// pre-activation order. branch_scale is set only where an activation stands before it.
struct FoldedBlock {
  at::Tensor x;
  std::optional<at::Tensor> pre_scale, pre_shift;
  std::vector<at::Tensor> weights;
  OptionalTensors biases;
  std::optional<at::Tensor> branch_scale, skip_scale;
  OptionalTensors slopes;
  std::optional<at::Tensor> residual;  // added in place of a skip path
};

struct BlockForward {
  at::Tensor out;
  std::vector<at::Tensor> conv_outputs, batch_stats;
};

}  // namespace resnet_fused
