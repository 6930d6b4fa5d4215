// The residual block on a GPU: training forward, backward and evaluation, as phases of csrc/cuda/kernels.
// Arguments and results are those of cpu/residual_block.h; float64 is refused.
#pragma once

#include "../../block/spec.h"
#include "../../block/tensors.h"

namespace resnet_fused::cuda {

struct Kernels {
  static BlockForward residual_block_forward(const BlockTensors& block, const BlockSpec& spec);
  static std::vector<at::Tensor> residual_block_backward(
      const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
      const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const Needs& needs, const BlockSpec& spec);
  static at::Tensor residual_block_infer(const FoldedBlock& block, const BlockSpec& spec);
};

}  // namespace resnet_fused::cuda
