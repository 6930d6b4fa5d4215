// The residual block on the CPU: training forward, backward and evaluation, one call each.
// Symbols and phases follow docs/architecture.md; x and the results are described in resnet_fused/ops/operators.py.
#pragma once

#include "../block/spec.h"
#include "../block/tensors.h"

namespace resnet_fused::cpu {

BlockForward residual_block_forward(const BlockTensors& block, const BlockSpec& spec);

// The wanted gradients, in flat order.
std::vector<at::Tensor> residual_block_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const Needs& needs, const BlockSpec& spec);

at::Tensor residual_block_infer(const FoldedBlock& block, const BlockSpec& spec);

}  // namespace resnet_fused::cpu
