// The running statistics of a block's batch norms, in one call: the same blend as resnet_fused/ops/running_stats.py,
// which costs one PyTorch operator call per tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace resnet_fused::cpu {

// running += factor * (batch - running) for each norm's mean and (unbiased) variance, and one more in its counter.
//
// batch_stats: [2, C] mean and biased variance; counts: the values per channel behind them. A norm that keeps no
// running statistics has undefined tensors; one that keeps them may have no counter. Where a tensor is not contiguous,
// not on the CPU or wider than batch_stats, it writes nothing and returns false.
bool update_running_stats(
    const std::vector<at::Tensor>& means, const std::vector<at::Tensor>& vars, const std::vector<at::Tensor>& counters,
    const std::vector<at::Tensor>& batch_stats, const std::vector<double>& factors, const std::vector<int64_t>& counts);

}  // namespace resnet_fused::cpu
