// A block made ready for evaluation by the engine: weights packed, norms as scale and shift of each epilogue, and a
// schedule for every input size it has met. Kept with the parameters by resnet_fused/backends/prepared.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../../block/spec.h"

namespace resnet_fused::cpu::engine {

// What a block is prepared from; lists by convolution, float32 vectors by channel.
struct Ingredients {
  std::vector<at::Tensor> weights;                 // [out, in / groups, R, S], any float dtype
  std::vector<std::optional<at::Tensor>> factors;  // multiplied into the weights
  std::vector<at::Tensor> scales, shifts;          // of the product; the projection's are not read
  std::optional<at::Tensor> pre_scale, pre_shift;  // of x before the first convolution
  std::vector<std::optional<at::Tensor>> slopes;
  std::optional<at::Tensor> branch_scale, skip_scale;
  std::vector<int64_t> pool;  // max pooling behind the block: kernel, stride, padding; empty: none
};

class PreparedBlock : public torch::CustomClassHolder {
 public:
  // Throws ValueError where `reason_against` has a reason.
  static c10::intrusive_ptr<PreparedBlock> prepare(Ingredients ingredients, BlockSpec spec, at::ScalarType dtype);

  // x: [N, C, H, W] of the block's dtype, in any layout; the stem also takes float32 instead. Returns channels_last, or
  // an undefined tensor where PyTorch has to compute the block, because a value between grouped convolutions,
  // between convolutions with padded channels, or at one by Winograd is not finite. residual: added in place of a skip
  // path, of the result's shape and the block's dtype.
  virtual at::Tensor run(const at::Tensor& x, const std::optional<at::Tensor>& residual) = 0;
  // Whether every weight and vector is finite; otherwise the block must not run.
  virtual bool finite() const = 0;
  // How inputs of this size run, in words.
  virtual std::string describe(int64_t images, int64_t height, int64_t width) = 0;
};

// Why the engine has no kernels for a block with convolutions of these sizes [out, in / groups, R, S], or nullopt.
std::optional<std::string> reason_against(
    const BlockSpec& spec, const std::vector<std::vector<int64_t>>& weights, at::ScalarType dtype);

// Why oneDNN's convolutions run such a block faster here, by a rule from the measurements beside it, or nullopt.
std::optional<std::string> faster_elsewhere(
    const BlockSpec& spec, const std::vector<std::vector<int64_t>>& weights, at::ScalarType dtype);

}  // namespace resnet_fused::cpu::engine
